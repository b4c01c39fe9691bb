"""Measure dpo_ray's stage `prepare`: rows/s against TRL's own preparation of the same rows, and peak memory.

    python -m benchmarks.prepare                        # about half an hour on two cores; first TRL's environment is made
    python -m benchmarks.prepare --hh 'hh/train-*.jsonl.gz' --tokenizer models/my-model --json result.json
    python -m benchmarks.prepare --measure speed --count 2000 --rounds 1          # a quick look

Both sides read the same JSON Lines files with the same tokenizer and chat template, each run in a fresh process with an
empty cache, in turns, on the same cores. `trl_side.py` and `dpo_ray_side.py` say what exactly is timed.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common.dialogues import MAKER_VERSION, Layout, read_hh, write_files
from benchmarks.common.process_tree import MemorySampler
from benchmarks.common.tiny_model import make_model
from benchmarks.common.trl_environment import cache_directory, trl_python
from benchmarks.prepare.report import (
    LAYOUTS,
    OURS,
    OURS_COLD,
    SIDES,
    TRL_DEFAULT,
    TRL_PARALLEL,
    Measured,
    Result,
    report,
)


def main() -> None:
    args = _arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # all that is started inherits it
    measured = Measured(args)
    if "speed" in args.measure:
        python = trl_python(args.environment)
        for layout in args.layouts:
            _measure_speed(layout, python, measured)
    if "memory" in args.measure:
        _measure_memory(args.layouts[0], measured)
    text = report(measured)
    print(text)
    if args.json:
        figures = {"speed": measured.speed, "agreement": measured.agreement, "memory": measured.memory}
        about = {"command": sys.argv, "date": str(datetime.date.today()), "report": text}
        args.json.write_text(json.dumps(figures | about, indent=1))


def _measure_speed(layout: Layout, trl: Path, measured: Measured) -> None:
    """Run the sides in turns, `rounds` times, and see whether they made the same tokens."""
    args = measured.args
    rows, sides = _rows(args, layout, args.count), measured.speed.setdefault(layout, {})
    tokens: dict[str, Counter[str]] = {}
    for number in range(args.rounds):
        for side in SIDES:
            result = _run(side, layout, rows, args, trl)
            tokens[side] = Counter(result.pop("digests"))
            sides.setdefault(side, []).append(result)
            rate = result["rows_in"] / result["seconds"]
            _say(f"{layout}, round {number + 1}, {side}: {result['seconds']:.1f} s, {rate:,.0f} rows/s")
    same, of_trl = (tokens[TRL_DEFAULT] & tokens[OURS]).total(), tokens[TRL_DEFAULT].total()
    measured.agreement[layout] = f"{same:,} of TRL's {of_trl:,} rows have the same token ids in dpo_ray's"


def _measure_memory(layout: Layout, measured: Measured) -> None:
    """Watch dpo_ray prepare few rows, and many."""
    for count in measured.args.memory_counts:
        rows = _rows(measured.args, layout, count)
        result = measured.memory[count] = _run(OURS, layout, rows, measured.args, watch_memory=True)
        _say(f"memory, {count:,} rows: peak {result['mib']:,.0f} MiB, {result['seconds']:.1f} s")


def _rows(args: argparse.Namespace, layout: Layout, count: int) -> list[Path]:
    """Make (once) or take the files to prepare."""
    if args.rows:
        return args.rows
    real = read_hh([Path(path) for path in sorted(glob.glob(args.hh))]) if args.hh else []
    if args.hh and not real:
        sys.exit(f"--hh {args.hh}: there is no dialogue in HH-RLHF's format")
    kind = f"hh-{_short_digest(args.hh)}" if args.hh else "made"
    return write_files(args.cache / f"rows-{MAKER_VERSION}-{kind}", count, args.rows_per_file, layout, real)


def _model(args: argparse.Namespace, layout: Layout) -> Path:
    """Make (once) the tokenizer and model that both sides load: of the rows of the speed measurement."""
    rows = _rows(args, layout, args.count)
    key = _short_digest("\n".join(map(str, [args.tokenizer, *rows])))
    return make_model(args.cache / f"model-{key}", rows, args.tokenizer)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _run(
    side: str,
    layout: Layout,
    rows: Sequence[Path],
    args: argparse.Namespace,
    trl: Path | None = None,
    *,
    watch_memory: bool = False,
) -> Result:
    """Run one side in a process of its own; returns what it measured, with its peak memory where that is watched."""
    model, ours = _model(args, layout), side in (OURS, OURS_COLD)
    with tempfile.TemporaryDirectory(prefix="run-", dir=args.cache) as scratch:
        result = Path(scratch) / "result.json"
        command = [
            *(
                [sys.executable, "-m", "benchmarks.prepare.dpo_ray_side"]
                if ours
                else [trl, "-m", "benchmarks.prepare.trl_side"]
            ),
            *(*rows, "--model", model, "--scratch", scratch, "--result", result),
            *("--max-length-tokens", args.max_length_tokens),
            *(["--turns"] if layout == "messages" else []),
            *(["--cores", args.cores] if ours else []),
            *(["--num-proc", args.cores] if side == TRL_PARALLEL else []),
            *(["--cold"] if side == OURS_COLD else []),
            *(["--no-digests"] if watch_memory else []),
        ]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{scratch}/huggingface"}
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        with MemorySampler(process.pid, enabled=watch_memory) as sampler:
            _, errors = process.communicate()
        if process.returncode:
            sys.exit(f"{side} failed:\n{errors.decode(errors='replace')[-4000:]}")
        return json.loads(result.read_text()) | (asdict(sampler.peak) if watch_memory else {})


def _say(text: str) -> None:
    """Report progress on standard error: standard output carries the result alone."""
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", choices=["speed", "memory"], default=["speed", "memory"])
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="memory: the first")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--count", type=int, default=20_000, help="rows of the speed measurement")
    parser.add_argument("--memory-counts", type=int, nargs="+", default=[40_000, 400_000])
    parser.add_argument("--rows-per-file", type=int, default=10_000)
    parser.add_argument("--rows", type=Path, nargs="+", help="JSON Lines of yours, in the (one) layout of --layouts")
    parser.add_argument("--hh", help="glob of HH-RLHF's files, to make rows of real text; default: of made words")
    parser.add_argument("--tokenizer", type=Path, help="a directory; default: one is trained on the rows")
    parser.add_argument("--max-length-tokens", type=int, default=1024)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument(
        "--environment", type=Path, help="directory of TRL's virtual environment; default: in the cache"
    )
    parser.add_argument("--cache", type=Path, default=cache_directory(), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file to write everything measured to")
    args = parser.parse_args()
    if args.rows and (len(args.layouts) > 1 or "memory" in args.measure):
        parser.error("--rows needs --measure speed and one of --layouts, which says how they are laid out")
    return args


if __name__ == "__main__":
    main()
