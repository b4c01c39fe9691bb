"""Measure dpo_ray's scoring of the reference: the engine pool against the bare engine and against TRL's precompute.

    python -m benchmarks.reference                              # first TRL's environment is made
    python -m benchmarks.reference --hh 'hh/train-*.jsonl.gz' --model models/my-llama --json result.json
    python -m benchmarks.reference --pairs-per-turn 64 --turns 2                    # a quick look

All sides score the same token ids with the same weights in float32 on the same cores, in turns of some pairs each, one right
after the other; `pool_side.py`, `engine_side.py` and `trl_side.py` say what exactly is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import glob
import hashlib
import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.dialogues import MAKER_VERSION, write_files
from benchmarks.common.machine import machine
from benchmarks.common.prepared_pairs import Pair, prepared_pairs
from benchmarks.common.tiny_model import Size, make_model
from benchmarks.common.trl_environment import cache_directory, trl_python
from benchmarks.common.turns import Answer, Side

POOL, POOL_UNSHARED, ENGINE, ENGINE_UNSHARED, TRL = SIDES = (
    "dpo_ray's pool",
    "dpo_ray's pool, prompts not shared",
    "bare engine",
    "bare engine, prompts not shared",
    "TRL's precompute",
)
WARM_UP_PAIRS = 32
WANTED = {  # the first is to be at least so many times as fast as the second
    (POOL, ENGINE): 0.9,
    (POOL, POOL_UNSHARED): 1.4,
    (POOL, TRL): 3.0,
}
SMALL_LLAMA = Size(vocabulary=4096, hidden=256, layers=6, heads=8)


def main() -> None:
    args = _arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # all that is started inherits it
    python = trl_python(args.environment)
    rows = sorted(map(Path, glob.glob(args.hh))) if args.hh else _made_rows(args)
    model = args.model or make_model(args.cache / f"llama-{_short_digest(str(rows))}", rows, None, SMALL_LLAMA)
    with tempfile.TemporaryDirectory(prefix="run-", dir=args.cache) as scratch:
        pairs = _pairs(rows, model, args, Path(scratch))
        measured = _measure(_turns(pairs, args, Path(scratch)), model.resolve(), python, args, Path(scratch))
    text = _report(measured, pairs, args)
    print(text)
    if args.json:
        about = {"command": sys.argv, "date": str(datetime.date.today()), "report": text}
        args.json.write_text(json.dumps({"measured": measured} | about, indent=1))


def _made_rows(args: argparse.Namespace) -> list[Path]:
    return write_files(args.cache / f"rows-{MAKER_VERSION}-made", 20_000, 10_000, "hh", [])


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _pairs(rows: Sequence[Path], model: Path, args: argparse.Namespace, scratch: Path) -> list[Pair]:
    """Prepare the rows with dpo_ray; returns as many pairs as the turns take, as token ids."""
    pairs = prepared_pairs(rows, model, args.max_length_tokens, args.cores, scratch)
    wanted = WARM_UP_PAIRS + args.turns * args.pairs_per_turn
    if len(pairs) < wanted:
        sys.exit(f"{wanted} pairs are wanted, and the rows give {len(pairs)}: lower --turns or --pairs-per-turn")
    return pairs[:wanted]


def _turns(pairs: list[Pair], args: argparse.Namespace, scratch: Path) -> list[Path]:
    """Write each turn's pairs to a file; the first is the warm-up."""
    starts = [0, *range(WARM_UP_PAIRS, len(pairs), args.pairs_per_turn), len(pairs)]
    files = []
    for start, stop in itertools.pairwise(starts):
        files.append(scratch / f"pairs-{start}.json")
        files[-1].write_text(json.dumps(pairs[start:stop]))
    return files


def _measure(
    turns: Sequence[Path], model: Path, trl: Path, args: argparse.Namespace, scratch: Path
) -> dict[str, list[Answer]]:
    """Run the sides in turns; the first turn of each side is not counted."""
    common = ("--model", model, "--cores", args.cores, "--max-length-tokens", args.max_length_tokens)
    commands = {
        POOL: (sys.executable, "-m", "benchmarks.reference.pool_side", *common, "--scratch", scratch / "pool"),
        POOL_UNSHARED: (
            *(sys.executable, "-m", "benchmarks.reference.pool_side", *common),
            *("--scratch", scratch / "pool-unshared", "--no-sharing"),
        ),
        ENGINE: (sys.executable, "-m", "benchmarks.reference.engine_side", *common),
        TRL: (trl, "-m", "benchmarks.reference.trl_side", *common, "--scratch", scratch / "trl"),
    }
    measured: dict[str, list[Answer]] = {side: [] for side in SIDES}
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((args.cache / "reference.log").open("wb"))
        sides = {name: stack.enter_context(Side(name, command, log)) for name, command in commands.items()}
        for number, file in enumerate(turns):
            for name in SIDES:
                process = sides[ENGINE if name == ENGINE_UNSHARED else name]
                answer = process.ask(
                    {"pairs": str(file), "warm_up": str(turns[0]), "share_prompt": name != ENGINE_UNSHARED}
                )
                if number:
                    measured[name].append(answer)
                    _say(
                        f"turn {number} of {len(turns) - 1}, {name}: {args.pairs_per_turn / answer['seconds']:.1f} pairs/s"
                    )
    return measured


def _report(measured: dict[str, list[Answer]], pairs: list[Pair], args: argparse.Namespace) -> str:
    """Write the table, the ratios that are wanted, and how far the sides agree."""
    seconds = {side: np.array([answer["seconds"] for answer in answers]) for side, answers in measured.items()}
    scored = pairs[WARM_UP_PAIRS:]
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in scored)
    lines = [
        f"## reference ({datetime.date.today()}; {machine(args.cores)})",
        "",
        f"Command: `{shlex.join(['python', *sys.argv])}`",
        "",
        f"{len(scored):,} pairs, {tokens:,} tokens (each prompt twice), in {args.turns} turns of each side",
        "",
        "| side | pairs/s | tokens/s | from the cache | scored again |",
        "|---|---|---|---|---|",
    ]
    for side, answers in measured.items():
        total = seconds[side].sum()
        cached = sum(answer.get("cached_tokens", 0) for answer in answers)
        again = sum(answer.get("rescored", 0) for answer in answers)
        lines.append(
            f"| {side} | {len(scored) / total:.1f} | {tokens / total:,.0f} | {cached / tokens:.0%} | {again} |"
        )
    lines.append("")
    for (first, second), wanted in WANTED.items():
        each = seconds[second] / seconds[first]
        lines.append(
            f"{first} is **{seconds[second].sum() / seconds[first].sum():.2f}x** as fast as {second} "
            f"(wanted: {wanted:g}x; by turn {each.min():.2f} to {each.max():.2f})."
        )
    engine = seconds[ENGINE_UNSHARED].sum() / seconds[ENGINE].sum()
    lines.append(f"The bare engine gains {engine:.2f}x from sharing prompts.")
    ours, trl = (np.array([s for answer in measured[side] for s in answer["sums"]]) for side in (POOL, TRL))
    lines += [
        "",
        f"Largest difference of a completion's log-prob, dpo_ray against TRL: {np.abs(ours - trl).max():.1e} nats.",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    """Report progress on standard error: standard output carries the result alone."""
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", help="glob of files in HH-RLHF's format; default: made rows of its lengths")
    parser.add_argument("--model", type=Path, help="a model directory; default: a random Llama of 6 M parameters")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--pairs-per-turn", type=int, default=256)
    parser.add_argument("--max-length-tokens", type=int, default=511)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument(
        "--environment", type=Path, help="directory of TRL's virtual environment; default: in the cache"
    )
    parser.add_argument("--cache", type=Path, default=cache_directory(), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file to write everything measured to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
