"""Steps against steps: groups/s of each side on HH-RLHF's lengths, and on pairs whose three parts are equally long."""

from __future__ import annotations

import argparse
import datetime
import glob
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common.dialogues import MAKER_VERSION, write_files
from benchmarks.common.machine import machine
from benchmarks.common.prepared_pairs import prepared_pairs
from benchmarks.common.tiny_model import Size, make_model
from benchmarks.common.trl_environment import cache_directory, trl_python
from benchmarks.train.dpo_ray_side import add_reference
from benchmarks.train.rows import Lengths, PairRow, made_rows, padded_share, token_ratio, write_rows
from dpo_ray.models.attention import IMPLEMENTATION

SHARED, PACKED, PADDED = "dpo_ray", "dpo_ray, layout: packed", "dpo_ray, layout: padded"
LAYOUTS = {SHARED: "shared", PACKED: "packed", PADDED: "padded"}
WANTED_OF_TRL = 4.0  # on HH-RLHF's lengths
WANTED_OF_IDEAL = 0.95  # of the ratio of tokens, shared over packed
LOSSES_AGREE = 1e-4  # relative, at every step
SMALL_LLAMA = Size(vocabulary=4096, hidden=256, layers=6, heads=8)

Measured = dict[str, list[dict[str, Any]]]
"""The answers of each side, by round."""


def run(args: argparse.Namespace) -> None:
    args.cache = args.cache or cache_directory()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # all that is started inherits it
    trl = trl_python(args.environment)
    files = sorted(map(Path, glob.glob(args.hh))) if args.hh else made_files(args.cache)
    model = (args.model or make_model(args.cache / "llama-train", files, None, SMALL_LLAMA)).resolve()
    texts, everything = [], {}
    with tempfile.TemporaryDirectory(prefix="run-", dir=args.cache) as scratch:
        for kind, rows in _rows(files, model, args, Path(scratch)).items():
            write_rows(rows, Path(scratch) / "rows.json")
            measured = _measure(Path(scratch) / "rows.json", model, trl, args, Path(scratch))
            everything[kind] = measured
            texts.append(_report(kind, rows, measured, args))
    head = (
        f"## train ({datetime.date.today()}; {machine(args.cores)})\n\nCommand: `{shlex.join(['python', *sys.argv])}`"
    )
    text = "\n\n".join([head, *texts])
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"measured": everything, "command": sys.argv, "report": text}, indent=1))


def made_files(cache: Path) -> list[Path]:
    """Make rows of HH-RLHF's lengths."""
    return write_files(cache / f"rows-{MAKER_VERSION}-made", 20_000, 10_000, "hh", [])


def _rows(files: Sequence[Path], model: Path, args: argparse.Namespace, scratch: Path) -> dict[str, list[PairRow]]:
    """Make the pairs of each kind, with the log-probs of the model before training as the reference."""
    count = (args.warm_up_steps + args.steps) * args.pairs_per_step
    kinds: dict[str, list[PairRow]] = {}
    if args.only != "equal":
        pairs = prepared_pairs(files, model, args.max_length_tokens, args.cores, scratch)[:count]
        if len(pairs) < count:
            sys.exit(f"{count} pairs are wanted, and the rows give {len(pairs)}: lower --steps")
        kinds["HH-RLHF's lengths"] = [
            PairRow(**pair, reference_chosen=[], reference_rejected=[])  # filled in below
            for pair in pairs
        ]
    if args.only != "hh":
        n = args.part_tokens
        vocabulary = AutoConfig.from_pretrained(model).vocab_size
        kinds[f"P = C = R = {n}"] = made_rows(Lengths(n, n, n), count, vocabulary, longest=2 * n)
    torch.set_num_threads(args.cores)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
    return {kind: add_reference(rows, policy) for kind, rows in kinds.items()}


def _measure(rows: Path, model: Path, trl: Path, args: argparse.Namespace, scratch: Path) -> Measured:
    """Run the sides in turns, each in a fresh process."""
    common = [
        *("--rows", rows, "--model", model, "--threads", args.cores, "--pairs-per-step", args.pairs_per_step),
        *("--warm-up-steps", args.warm_up_steps, "--learning-rate", args.learning_rate),
    ]
    commands: dict[str, list[Any]] = {
        side: [sys.executable, "-m", "benchmarks.train.dpo_ray_side", *common, "--layout", layout]
        for side, layout in LAYOUTS.items()
    }
    for size in args.trl_micro_batch:
        commands[trl_side(size)] = [
            *(trl, "-m", "benchmarks.train.trl_side", *common),
            *("--scratch", scratch / "trl", "--micro-batch", size),
        ]
    measured: Measured = {side: [] for side in commands}
    pairs = args.steps * args.pairs_per_step
    for number in range(args.rounds):
        for side, command in commands.items():
            answer = answer_of(side, command, args.cache / "train.log")
            measured[side].append(answer)
            rate, load = pairs / answer["seconds"], answer["load"]
            say(f"round {number + 1} of {args.rounds}, {side}: {rate:.2f} pairs/s (load {load:.1f})")
    return measured


def trl_side(micro_batch: int) -> str:
    return f"TRL, {micro_batch} pairs a forward pass"


def answer_of(side: str, command: Sequence[Any], log: Path) -> dict[str, Any]:
    """Run a side; returns the JSON of its last line. What it said besides is in the log."""
    with log.open("ab") as stream:
        told = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=stream, text=True)
    if told.returncode:
        sys.exit(f"{side} failed; see {log}")
    return json.loads(told.stdout.splitlines()[-1])


def _report(kind: str, rows: Sequence[PairRow], measured: Measured, args: argparse.Namespace) -> str:
    """Write the table, the ratios that are wanted, and how far the losses agree."""
    counted = rows[args.warm_up_steps * args.pairs_per_step :]
    tokens = sum(2 * p + c + r for p, c, r in (row.lengths for row in counted))
    seconds = {side: np.array([a["seconds"] for a in answers]) for side, answers in measured.items()}
    ideal, padding = token_ratio(counted), padded_share(counted, args.pairs_per_step)
    lines = [
        f"### {kind}",
        "",
        f"{len(counted)} pairs in steps of {args.pairs_per_step}, {tokens:,} tokens with each prompt twice, "
        f"{ideal:.3f} times as many as with each prompt once; {padding:.0%} of padded batches is padding.",
        "",
        "| side | pairs/s, median of rounds | slowest to fastest round | tokens/s | CPU s a pair |",
        "|---|---|---|---|---|",
    ]
    for side, each in seconds.items():
        rate = len(counted) / each
        cpu = np.median([a["cpu_seconds"] for a in measured[side]]) / len(counted)
        lines.append(
            f"| {side} | {np.median(rate):.2f} | {rate.min():.2f} to {rate.max():.2f} "
            f"| {tokens / np.median(each):,.0f} | {cpu:.3f} |"
        )
    # TRL with the whole batch in a forward pass, as dpo_ray takes it; then TRL as it is fastest here.
    whole = trl_side(max(args.trl_micro_batch))
    best = min((trl_side(size) for size in args.trl_micro_batch), key=lambda side: float(np.median(seconds[side])))
    to_packed, to_padded = seconds[PACKED] / seconds[SHARED], seconds[PADDED] / seconds[SHARED]
    wanted = f"wanted on HH-RLHF's lengths: {WANTED_OF_TRL:g}x; " if kind.startswith("HH") else ""
    lines.append("")
    for side in dict.fromkeys((whole, best)):
        ratios = seconds[side] / seconds[SHARED]
        lines.append(
            f"dpo_ray is **{np.median(ratios):.2f}x** as fast as {side} ({wanted if side == whole else ''}{_extent(ratios)})."
        )
    lines += [
        f"Sharing prompts gains {np.median(to_packed):.3f}x over packing them twice ({_extent(to_packed)}): "
        f"**{np.median(to_packed) / ideal:.2f}** of the ratio of tokens (wanted: {WANTED_OF_IDEAL:g}), "
        f"and {np.median(to_padded):.2f}x over padding ({_extent(to_padded)}).",
        f"By CPU time, which other work on the machine disturbs less: {_cpu_ratio(measured, best):.2f}x TRL, "
        f"{_cpu_ratio(measured, PACKED):.3f}x packing ({_cpu_ratio(measured, PACKED) / ideal:.2f} of the ratio of tokens), "
        f"{_cpu_ratio(measured, PADDED):.2f}x padding.",
        _agreement(measured),
    ]
    return "\n".join(lines)


def _cpu_ratio(measured: Measured, side: str) -> float:
    each, ours = ([answer["cpu_seconds"] for answer in measured[name]] for name in (side, SHARED))
    return float(np.median(each) / np.median(ours))


def _extent(ratios: np.ndarray) -> str:
    return f"by round {ratios.min():.2f} to {ratios.max():.2f}"


def _agreement(measured: Measured) -> str:
    """Describe how far the losses of all sides agree; end the run if the sides did different work."""
    losses = {side: np.array([answer["losses"] for answer in answers]) for side, answers in measured.items()}
    ours = losses[SHARED][0]
    worst = {side: float(np.abs(each / ours - 1).max()) for side, each in losses.items()}
    for side, difference in worst.items():
        if difference > LOSSES_AGREE:
            sys.exit(
                f"the losses of {side} differ by a relative {difference:.1e}: {losses[side].tolist()}, {ours.tolist()}"
            )
    return f"The losses of all {len(ours)} steps, from {ours[0]:.4f} to {ours[-1]:.4f}, agree within {max(worst.values()):.0e}."


def say(text: str) -> None:
    """Report progress on standard error: standard output carries the result alone."""
    print(text, file=sys.stderr, flush=True)
