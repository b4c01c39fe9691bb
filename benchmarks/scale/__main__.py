"""Simulate what these machines cannot run: up to 4,096 ranks and 100 million groups, without tensors.

    python -m benchmarks.scale                    # some 80 CPU seconds, two processes at a time
    python -m benchmarks.scale --write docs       # ... and put figures and picture into docs/scale.md and docs/scale.svg
    python -m benchmarks.scale --json scale.json

Replays the project's own dealing of steps, runs pieces of its schedule, store and checkpoint code in sizes that take seconds,
and draws straight lines from there; `docs/scale.md` says what is measured, simulated and assumed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

# Processes that measure import this file too, and their memory is watched: what loads torch or Ray is imported in `main`.

WORLDS, GROUPS_PER_RANK, FIXED_GROUPS = (8, 64, 512, 4096), (2, 8, 32), 512
ORDERS, GROUPS = (100_000, 1_000_000, 10_000_000), 100_000_000
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def main() -> None:
    args = _arguments()
    began = time.monotonic()

    def say(text: str) -> None:
        """Report progress on standard error: standard output carries the result alone."""
        print(f"[{time.monotonic() - began:5.1f} s] {text}", file=sys.stderr, flush=True)

    from benchmarks.common.machine import machine
    from benchmarks.scale.figures import figures
    from benchmarks.scale.picture import draw
    from benchmarks.scale.process import own_peak_bytes
    from benchmarks.scale.tables import tables

    found = figures(WORLDS, GROUPS_PER_RANK, FIXED_GROUPS, args.orders, GROUPS, say)
    seconds, cpu_seconds = time.monotonic() - began, sum(os.times()[:4])  # its own, and of processes that have ended
    peak_gib = max(own_peak_bytes(), found.child_peak_bytes) / 2**30
    took = f"{datetime.date.today()}, {machine(2)}; {cpu_seconds:.0f} CPU s in {seconds:.0f} s, {peak_gib:.1f} GiB at most in one process"
    text = f"{tables(found)}\n\n{took}"
    print(text)
    if args.json:
        args.json.write_text(json.dumps(asdict(found) | {"command": sys.argv, "report": text}, indent=1))
    if args.write:
        page = args.write / "scale.md"
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
        draw(found, args.write / "scale.svg")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--orders", type=int, nargs="+", default=ORDERS, help="groups whose order is built; default: %(default)s"
    )
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--write", type=Path, help="directory of scale.md, whose figures are replaced, and scale.svg")
    return parser.parse_args()


if __name__ == "__main__":
    main()
