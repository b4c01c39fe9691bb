"""A whole run of each side on the same files, from the command to the saved model: interpreter, Ray, engine and all.

dpo_ray: `dpo-ray run` with prepare, the reference from vLLM, schedule, one epoch of training, and the export. TRL:
`train_trl_end_to_end.py`: reading and tokenizing the files, the precomputed reference, one epoch, and the saved model.
Neither evaluates or samples, and nothing is there from an earlier run. Each side's order of the pairs is its own, so its
losses are too.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import gzip
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine
from benchmarks.common.tiny_model import make_model
from benchmarks.common.trl_environment import cache_directory, trl_python
from benchmarks.train.steps import SMALL_LLAMA, made_files, say, trl_side

OURS = "dpo_ray"
WANTED = 3.0


def run(args: argparse.Namespace) -> None:
    args.cache = args.cache or cache_directory()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # all that is started inherits it
    trl = trl_python(args.environment)
    files = sorted(Path(file).resolve() for file in glob.glob(args.hh)) if args.hh else made_files(args.cache)[:1]
    model = (args.model or make_model(args.cache / "llama-train", files, None, SMALL_LLAMA)).resolve()
    pairs = sum(_count_lines(file) for file in files)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="whole-", dir=args.cache) as scratch:
        commands: dict[str, list[Any]] = {}
        if "dpo_ray" in args.sides:
            commands[OURS] = _dpo_ray(files, model, args, Path(scratch))
        if "trl" in args.sides:
            commands |= {trl_side(n): _trl(trl, n, files, model, args, Path(scratch)) for n in args.trl_micro_batch}
        for number, (side, command) in enumerate(commands.items()):
            seconds[side] = _timed(side, command, args.cache / f"train-end-to-end-{number}.log", Path(scratch))
            say(f"{side}: {seconds[side]:.0f} s")
    text = _report(seconds, pairs, args)
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "command": sys.argv, "report": text}, indent=1))


def _count_lines(file: Path) -> int:
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        return sum(1 for _ in stream)


def _dpo_ray(files: Sequence[Path], model: Path, args: argparse.Namespace, scratch: Path) -> list[Any]:
    recipe = {
        "name": "end-to-end",
        "output": str(scratch / "dpo-ray"),
        "model": {"path": str(model)},
        "data": {
            "train": [str(file) for file in files],
            "chat_template": "plain",
            "max_length_tokens": args.max_length_tokens,
            "max_quarantined_fraction": 1,
        },
        "reference": {"engine": "vllm"},
        "train": {
            "workers": 1,
            "epochs": 1,
            "groups_per_step": args.pairs_per_step,
            "optimizer": {"learning_rate": args.learning_rate, "warmup_fraction": 0.1, "decay": "linear"},
            "checkpoint_every_steps": None,
        },
        "evaluate": {"sample_prompts": 0},
        "cluster": {"roles": {"reference": {"cpus": args.cores}, "train": {"cpus": args.cores}}},
        "trackers": [],
    }
    path = scratch / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return [Path(sys.executable).parent / "dpo-ray", "run", path]


def _trl(
    python: Path, micro_batch: int, files: Sequence[Path], model: Path, args: argparse.Namespace, scratch: Path
) -> list[Any]:
    return [
        *(
            python,
            "-m",
            "benchmarks.train.trl_end_to_end",
            "--model",
            model,
            "--scratch",
            scratch / f"trl-{micro_batch}",
        ),
        *("--pairs-per-step", args.pairs_per_step, "--micro-batch", micro_batch),
        *("--learning-rate", args.learning_rate, "--max-length-tokens", args.max_length_tokens),
        *("--threads", args.cores, "--files", *files),
    ]


def _timed(side: str, command: Sequence[Any], log: Path, scratch: Path) -> float:
    # Nothing that an earlier run left may help: data sets of Hugging Face are cached by their bytes.
    environment = os.environ | {"HF_DATASETS_CACHE": str(scratch / "datasets")}
    with log.open("wb") as stream:
        began = time.perf_counter()
        code = subprocess.run(
            [str(word) for word in command], stdout=stream, stderr=stream, env=environment, cwd=scratch
        ).returncode
        seconds = time.perf_counter() - began
    if code:
        sys.exit(f"{side} failed; see {log}")
    return seconds


def _report(seconds: dict[str, float], pairs: int, args: argparse.Namespace) -> str:
    lines = [
        f"## train, end to end ({datetime.date.today()}; {machine(args.cores)})",
        "",
        f"Command: `{shlex.join(['python', *sys.argv])}`",
        "",
        f"{pairs:,} pairs, one epoch, {args.pairs_per_step} pairs a step",
        "",
        "| side | wall-clock | pairs/s |",
        "|---|---|---|",
        *(f"| {side} | {each:.0f} s | {pairs / each:.2f} |" for side, each in seconds.items()),
    ]
    if OURS in seconds:
        lines += [
            "",
            *(
                f"dpo_ray is **{each / seconds[OURS]:.2f}x** as fast as {side} (wanted: {WANTED:g}x)."
                for side, each in seconds.items()
                if side != OURS
            ),
        ]
    return "\n".join(lines)
