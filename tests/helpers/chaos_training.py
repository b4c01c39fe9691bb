"""Train with two real workers under Ray Train while they are killed, hung or changed in number. Prints what came of it.

A program of its own, as a process has one Ray, and as the driver is killed too: `training.py DIRECTORY WHAT`. Prints a line
of JSON per run: how it ended, the digest of the weights, the steps that every attempt did.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray

from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.cluster.workers import run_workers, start_inbox
from dpo_ray.config.model import ModelConfig
from dpo_ray.errors import DpoRayError
from dpo_ray.schedule.files import bucket_ranges, file_name, step_table
from dpo_ray.train.task import TrainTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers import training, traps
from tests.helpers.role_resources import WORKER
from tests.helpers.traps import POINTS, arm_trap

STEPS, EVERY, MOMENTS = 160, 4, 20
GROUPS_PER_STEP = training.GROUPS_PER_STEP


@dataclasses.dataclass(frozen=True)
class Files:
    """A schedule in a directory."""

    root: str
    steps: int

    @property
    def rows(self) -> dict[str, int]:
        return {"train/steps": self.steps, "train/groups": self.steps * GROUPS_PER_STEP}

    def open(self, name: str) -> Any:
        return open(f"{self.root}/{name}", "rb")


def write_schedule(root: Path, worlds: tuple[int, ...], steps: int) -> None:
    """Write the same groups, step by step, packed for each number of workers."""
    groups, n = training.make_groups(steps * GROUPS_PER_STEP), GROUPS_PER_STEP
    for world in worlds:
        for rank in range(world):
            for bucket in bucket_ranges(steps):
                shares = [training.rank_step(s, groups[s * n : (s + 1) * n], world, rank, 80) for s in bucket]
                path = root / f"world-{world}" / file_name("train", rank, bucket.start)
                path.parent.mkdir(parents=True, exist_ok=True)
                with pq.ParquetWriter(path, step_table(shares[0]).schema) as writer:
                    for share in shares:
                        writer.write_table(step_table(share))


def worker(settings: dict[str, Any]) -> Any:
    """Train as production does, with a trap of the test's set, and a step that takes a while."""
    import torch.distributed as dist

    from dpo_ray.train import loop, worker

    task, rank, root = settings["task"], dist.get_rank(), Path(settings["task"].template)
    task.inbox.put.remote({"pid": os.getpid()})
    slow = float((root / "slow").read_text()) if (root / "slow").exists() else 0.0
    traps.wrap_function(loop, "train_step", lambda: time.sleep(slow), lambda: None)
    traps.set_next_trap(root, rank)
    task = dataclasses.replace(task, template="plain")
    return worker.train_and_export(task)


class Killer:
    """Follow a run, and kill its workers at random moments of their training: one of them, or both."""

    def __init__(self, inbox: Any, kills: int) -> None:
        self.attempts: list[list[int]] = []  # of each: the step it began with, and those it did
        self._inbox, self._left, self._random = inbox, kills, random.Random(0)
        self._pids: list[int] = []
        self._strike_at: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def _follow(self) -> None:
        while not self._end.wait(0.02):
            self._look()
            if self._strike_at is not None and time.monotonic() >= self._strike_at:
                victims = self._pids[-2:]
                for pid in victims if self._left % 3 == 0 else [self._random.choice(victims)]:
                    os.kill(pid, signal.SIGKILL)
                self._left, self._strike_at = self._left - 1, None

    def _look(self) -> None:
        for row in ray.get(self._inbox.take.remote()):
            if "pid" in row:
                self._pids.append(row["pid"])
            elif "restored_step" in row:
                self.attempts.append([row["restored_step"]])
                if self._left:
                    self._strike_at = time.monotonic() + self._random.uniform(0, 0.8)
            else:
                self.attempts[-1].append(row["step"])


def run(root: Path, schedule: Path, name: str, *, workers: int = 2, kills: int = 0, **changes: Any) -> dict[str, Any]:
    """Train to the end, or to the error; the same root goes on from its checkpoints."""
    root.mkdir(parents=True, exist_ok=True)
    steps = changes.pop("steps", STEPS)
    # A small rate: each update enlarges what another order of sums over ranks has rounded otherwise.
    optimizer = training.optimizer_config(learning_rate=1e-4)
    config = training.make_config(
        **{"optimizer": optimizer, "workers": workers, "checkpoint_every_steps": EVERY, "max_failures": 100, **changes}
    )
    inbox = start_inbox()
    task = TrainTask(
        model=ModelConfig(path="builtin:sentiment_llama"),
        config=config,
        dtype="float32",
        template=str(root),  # where the traps lie; the worker puts the template in its place
        schedule=Files(str(schedule / f"world-{workers}"), steps),
        checkpoints=Storage(root / "checkpoints"),
        staging=Staging(Storage(root), Storage(root / "out"), name, "train", "key", "chaos"),
        inbox=inbox,
        audit=None,
        cpus=1,
    )
    began, error, messages = time.monotonic(), "", []
    names = {"name": name, "where": "train", "goes_on": "from the checkpoint"}
    with Killer(inbox, kills) as followed:
        try:
            account = run_workers(worker, task, config, WORKER, say=messages.append, **names)
            error = str(account.get("error", ""))
        except DpoRayError as raised:
            error = str(raised)
    weights, metrics = root / "out/policy/model.safetensors", root / "out/metrics.jsonl"
    return {
        "run": f"{root.name} {name}",
        "error": error,
        "messages": messages,
        "weights": "" if error else hashlib.sha256(weights.read_bytes()).hexdigest(),
        "losses": [] if error else [json.loads(line)["loss"] for line in metrics.read_text().splitlines()],
        "attempts": followed.attempts,
        "seconds": time.monotonic() - began,
    }


def slow(root: Path, seconds: float) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "slow").write_text(str(seconds))


def scenes(directory: Path, schedule: Path, what: str) -> Any:
    """Yield the accounts of a scene's runs."""
    if what == "quiet":
        yield run(directory / "quiet", schedule, "a-1")
    elif what == "points":
        root = directory / what
        for number, name in enumerate(POINTS):
            arm_trap(root, f"{number:02d}", "kill", *POINTS[name])
        yield run(root, schedule, "a-1")
    elif what == "moments":
        slow(directory / "moments", 0.05)
        yield run(directory / "moments", schedule, "a-1", kills=MOMENTS)
    elif what == "hang":
        root = directory / "hang"
        arm_trap(root, "0", "hang", 1, "in", "dpo_ray.train.step", "clip_gradients")
        yield run(root, schedule, "a-1", hang_seconds=15)
    elif what == "hang for good":
        root = directory / "hung for good"
        arm_trap(root, "0", "hang", 1, "in", "dpo_ray.train.step", "clip_gradients")
        yield run(root, schedule, "a-1", hang_seconds=15, max_failures=0)
    elif what == "sizes":
        root = directory / "sizes"
        for number, workers in enumerate((2, 1, 4)):
            if workers != 4:
                arm_trap(root, "0", "kill", *POINTS["after pruning"])
            yield run(root, schedule, f"a-{number}", workers=workers, max_failures=0)
    elif what == "driver":
        slow(directory / "driver", 0.05)
        yield run(directory / "driver", schedule, f"a-{time.time_ns()}")


def main(directory: Path, whats: list[str]) -> None:
    schedule = directory / "schedule"
    if not schedule.exists():
        write_schedule(schedule, (1, 2, 4), STEPS)
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        num_cpus=6, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False, logging_level="ERROR"
    )
    for module in (sys.modules["__main__"], traps):  # workers do not find the tests' modules
        ray.cloudpickle.register_pickle_by_value(module)
    for what in whats:
        for account in scenes(directory, schedule, what):
            print(json.dumps(account), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
