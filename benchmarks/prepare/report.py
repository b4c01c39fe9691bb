"""Write what `prepare.py` measured as Markdown, with what a reader needs to judge it."""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.machine import machine

TRL_DEFAULT, TRL_PARALLEL, OURS, OURS_COLD = SIDES = (
    "TRL, as it comes",
    "TRL, dataset_num_proc",
    "dpo_ray",
    "dpo_ray, cold workers",
)
LAYOUTS = {"messages": "conversations, ChatML", "hh": "HH-RLHF's text, no template"}
WANTED_SPEEDUP, WANTED_MEMORY_RATIO = 5.0, 1.2
BEFORE_THE_CLOCK = {"imports": "import_seconds", "Ray's start": "ray_start_seconds", "warm-up": "warm_up_seconds"}

Result = dict[str, Any]


@dataclass
class Measured:
    """All that was measured, and the settings it was measured with."""

    args: argparse.Namespace
    speed: dict[str, dict[str, list[Result]]] = field(default_factory=dict)  # layout -> side -> a result of each round
    agreement: dict[str, str] = field(default_factory=dict)  # layout -> how many rows got the same tokens
    memory: dict[int, Result] = field(default_factory=dict)  # rows -> what was held


def report(m: Measured) -> str:
    """Write the tables, and under them what the figures hold and what they leave out."""
    lines = [f"## prepare ({datetime.date.today()}; {machine(m.args.cores)})", ""]
    lines += [f"Command: `{shlex.join(['python', *sys.argv])}`"]
    for layout in m.speed:
        lines += ["", *_speed_table(layout, m)]
    if m.memory:
        lines += ["", *_memory_table(m.memory)]
    return "\n".join([*lines, "", *_notes(m)])


def _median(rounds: list[Result], what: str) -> float:
    return statistics.median(result[what] for result in rounds)


def _speed_table(layout: str, m: Measured) -> list[str]:
    """Write a row for each side, and the ratios under it."""
    sides, cores = m.speed[layout], m.args.cores
    count = sides[OURS][0]["rows_in"]
    lines = [
        f"### {count:,} rows, {LAYOUTS[layout]}; in turns, {m.args.rounds} of each",
        "",
        "| side | seconds, each round | rows/s, median | CPU s, median | rows out | before the clock |",
        "|---|---|---|---|---|---|",
    ]
    for side, rounds in sides.items():
        seconds = ", ".join(f"{result['seconds']:.1f}" for result in rounds)
        before = [f"{k} {_median(rounds, v):.1f} s" for k, v in BEFORE_THE_CLOCK.items() if v in rounds[0]]
        lines.append(
            f"| {_called(side, cores)} | {seconds} | {count / _median(rounds, 'seconds'):,.0f} "
            f"| {_median(rounds, 'cpu_seconds'):.1f} | {rounds[0]['rows_out']:,} | {', '.join(before)} |"
        )
    for side in (TRL_DEFAULT, TRL_PARALLEL):
        wall, cpu = (_median(sides[side], what) / _median(sides[OURS], what) for what in ("seconds", "cpu_seconds"))
        lines += ["", f"dpo_ray is **{wall:.1f}x** as fast as {_called(side, cores)} "]
        lines[-1] += f"(wanted: {WANTED_SPEEDUP:g}x); in CPU seconds {cpu:.1f}x."
    return [*lines, "", f"Agreement: {m.agreement[layout]}."]


def _called(side: str, cores: int) -> str:
    return f"{side}={cores}" if side == TRL_PARALLEL else side


def _memory_table(memory: dict[int, Result]) -> list[str]:
    """Write a row for each number of rows, and the ratio under it."""
    lines = [
        "### Peak memory of dpo_ray: PSS of the driver and all that it started",
        "",
        "| rows | peak MiB | of it | /dev/shm at most, MiB | prepare, s |",
        "|---|---|---|---|---|",
    ]
    for count, result in memory.items():
        parts = ", ".join(f"{kind} {mib:,.0f}" for kind, mib in result["by_process_mib"].items())
        shared = result["shared_memory_mib"]
        lines.append(f"| {count:,} | {result['mib']:,.0f} | {parts} | {shared:,.0f} | {result['seconds']:.1f} |")
    few, *_, many = sorted(memory) * 2
    grown = memory[many]["mib"] / memory[few]["mib"]
    wanted = f"(wanted: at most {WANTED_MEMORY_RATIO:g}x)"
    return [*lines, "", f"{many:,} rows take **{grown:.2f}x** the memory of {few:,} {wanted}."]


def _notes(m: Measured) -> list[str]:
    """List what the numbers include, and what they leave out."""
    args = m.args
    first = [rounds[0] for sides in m.speed.values() for rounds in sides.values()] + list(m.memory.values())
    versions = {name: version for result in first for name, version in result["versions"].items()}
    if args.rows:
        rows = f"the files {', '.join(map(str, args.rows))}"
    else:
        made = f"spliced from {args.hh}" if args.hh else "made, with the lengths of HH-RLHF's harmless-base subset"
        rows = f"{made}, in JSON Lines files of {args.rows_per_file:,}"
    speed_notes = [
        "- The clock of TRL: `datasets.load_dataset` into an empty cache and DPOTrainer's `_prepare_dataset`, which writes "
        "Arrow to that cache. The clock of dpo_ray: `dpo_ray.run.offline.prepared` into an empty output directory: plan, "
        "tokenize, check, look for duplicates and conflicts, write Parquet, commit.",
        "- Neither clock holds process start, imports, tokenizer and model in the first process; `before the clock` says "
        "what imports and Ray's start took. `cold workers` is without the warm-up, in which Ray's workers import their "
        "libraries: it holds what the first run on a Ray pays once.",
        "- Agreement compares prompt + completion of every row, cut to the same length. After the end of a turn TRL keeps "
        "what the template writes (in ChatML a line break), dpo_ray does not: it is left out of the comparison. To plain "
        "text both append EOS. Of HH-RLHF's text TRL takes all that the two sides share as the prompt, dpo_ray all up to "
        "the last answer: there the whole is compared, not where it is divided.",
    ]
    return [
        f"- Rows: {rows}. Tokenizer: {args.tokenizer or 'a byte-level BPE of 32,000 entries trained on them'}.",
        *(speed_notes if m.speed else []),
        f"- Python {platform.python_version()}; {', '.join(f'{name} {version}' for name, version in versions.items())}.",
    ]
