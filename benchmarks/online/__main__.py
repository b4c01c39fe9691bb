"""Measure online rounds against offline DPO in the world of the quickstart, whose true reward is known.

    python -m benchmarks.online                     # three seeds; about a quarter of an hour on two cores
    python -m benchmarks.online --seeds 0 --json online.json

Each seed: `pipelines/quickstart_online.yaml` as it is; and `pipelines/quickstart.yaml` with several strengths of training, on
as many pairs or fewer, whose rewards are interpolated at the KL of the online run's end (linear in the square root of KL, as the
frontier is for small KL). Exits with 1 where a round does not raise the reward, or the end is not above offline DPO's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine

RECIPES = Path(__file__).resolve().parents[2] / "pipelines"
PAIRS = 3 * 1536  # those of three rounds
OFFLINE = (
    ("train.optimizer.learning_rate=2e-4", f"data.train.pairs={PAIRS}"),
    ("train.optimizer.learning_rate=3e-4", "data.train.pairs=3200"),  # the quickstart's own
    ("train.optimizer.learning_rate=3e-4", f"data.train.pairs={PAIRS}"),
    ("train.optimizer.learning_rate=4e-4", f"data.train.pairs={PAIRS}"),
)
"""Overrides of each offline run, from weak to strong."""

Point = tuple[float, float]
"""KL (nats a completion) and true reward of held-out samples."""


def main() -> None:
    args = _arguments()
    lines, results, passed = [], [], True
    for seed in args.seeds:
        with tempfile.TemporaryDirectory(prefix="dpo-ray-online-") as output:
            began = time.monotonic()
            rounds = online_points(seed, output)
            seconds = time.monotonic() - began
            offline = [offline_point(seed, output, overrides, number) for number, overrides in enumerate(OFFLINE)]
        (kl, reward), initial = rounds[-1], rounds[0][1]
        at_same_kl = interpolated(offline, kl)
        rises = all(after[1] > before[1] for before, after in pairwise(rounds))
        above = at_same_kl is not None and reward > at_same_kl
        passed &= rises and above
        results.append({"seed": seed, "rounds": rounds, "offline": offline, "seconds": seconds})
        steps = " → ".join(f"{r:+.2f} ({k:.2f})" for k, r in rounds[1:])
        theirs = "not bracketed" if at_same_kl is None else f"{at_same_kl:+.2f}"
        lines.append(
            f"| {seed} | {initial:+.2f} | {steps} | {theirs} | {reward - (at_same_kl or math.nan):+.2f} | {seconds:.0f} s |"
        )
        say(lines[-1])
        say("  offline: " + ", ".join(f"{r:+.2f} ({k:.2f})" for k, r in offline))
    print(
        f"## online ({datetime.date.today()}; {machine(os.cpu_count() or 1)})\n\nCommand: `{shlex.join(['python', *sys.argv])}`\n"
    )
    print("| seed | initial reward | reward (KL) after each round | offline DPO at the last KL | gain | online run |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    sys.exit(0 if passed else 1)


def online_points(seed: int, output: str) -> list[Point]:
    """Run the rounds; returns the initial policy's point and that of each round."""
    recipe = [RECIPES / "quickstart_online.yaml", f"output={output}", f"seed={seed}"]
    run("run", *recipe)
    rows = json.loads(run("rounds", *recipe, "--json"))
    manifest = next(Path(output).glob("artifacts/measure-*/manifest.json"))
    initial = json.loads(manifest.read_text())["figures"]["initial"]["true_reward"]
    return [(0.0, initial), *((row["kl"], row["true_reward"]) for row in rows)]


def offline_point(seed: int, output: str, overrides: Sequence[str], number: int) -> Point:
    """Run an offline recipe; returns where its policy ends."""
    run(
        *("run", RECIPES / "quickstart.yaml", f"output={output}", f"seed={seed}", f"name=offline-{number}"),
        *("train.eval_every_steps=null", "evaluate.sample_prompts=512", "data.eval.pairs=640", *overrides),
    )
    report = Path(output) / f"offline-{number}"
    (manifest,) = (
        m
        for m in Path(output).glob("artifacts/evaluate-*/manifest.json")
        if json.loads(m.read_text())["run"] == report.name
    )
    samples = json.loads(manifest.read_text())["figures"]["samples"]
    return samples["kl"], samples["policy_true_reward"]


def interpolated(points: Sequence[Point], kl: float) -> float | None:
    """Read the reward at a KL off the line through the points on both sides of it; None where there are none on one."""
    ordered = sorted(points)
    for (k0, r0), (k1, r1) in pairwise(ordered):
        if k0 <= kl <= k1:
            share = (math.sqrt(kl) - math.sqrt(k0)) / (math.sqrt(k1) - math.sqrt(k0))
            return r0 + share * (r1 - r0)
    return None


def run(*words: Any) -> str:
    command = [str(Path(sys.executable).parent / "dpo-ray"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file to write every point to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
