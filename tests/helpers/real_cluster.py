"""A namespace of a real Kubernetes cluster with the KubeRay operator, and the command line as a user has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_ray.deploy.kubernetes.client import POD, RAY_JOB, Cluster

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]

# A short run with the moments that tests wait for: 40 steps, a checkpoint every 10.
SMALL = (
    "data.train=[{type: synthetic, pairs: 1280}]",
    "data.eval=[{type: synthetic, pairs: 128}]",
    "train.eval_every_steps=20",
    "train.checkpoint_every_steps=10",
    "evaluate.sample_prompts=16",
    "evaluate.max_new_tokens=16",
)
# The same with so many steps that it does not end while a test does something to it.
LONG = (
    *SMALL,
    "data.train=[{type: synthetic, pairs: 3200}]",
    "train.epochs=16",
)

HAS_CHECKPOINT = (
    r"train: (?:[3-9]\d|\d{3}|\d,\d{3})/"  # a line that LONG writes after its first checkpoint is committed
)


@dataclass
class Command:
    """A command that runs, with every line that it has printed and when."""

    process: subprocess.Popen[str]
    began: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append((time.monotonic() - self.began, line.rstrip("\n")))

    @property
    def text(self) -> str:
        """Return all that it has printed."""
        return "\n".join(line for _, line in self.lines)

    def wait_for(self, pattern: str, seconds: float) -> float:
        """Wait until it has printed a pattern; return how many seconds after its start that was."""
        until = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            for at, line in list(self.lines):
                if re.search(pattern, line):
                    return at
            assert not ended, f"it ended with {self.process.returncode} before it printed {pattern!r}:\n{self.text}"
            assert time.monotonic() < until, f"no {pattern!r} within {seconds:g} s:\n{self.text}"
            time.sleep(0.1)

    def end(self, seconds: float) -> int:
        """Wait until it has ended; return its exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended within {seconds:g} s:\n{self.text}") from None
        time.sleep(0.2)  # for the thread that reads the last lines
        return code


@dataclass
class RealCluster:
    """A connection to a cluster, the namespace of the tests, and what every recipe needs there."""

    connection: Cluster
    namespace: str
    image: str
    directory: Path
    environment: dict[str, str] = field(default_factory=dict)

    def overrides(self, name: str, *more: str) -> list[str]:
        """Return the values of a recipe that make it run here under a name."""
        storage = "claim: results, create_gib: 10"
        if storage_class := os.environ.get("DPO_RAY_TEST_STORAGE_CLASS"):
            storage += f", storage_class: {storage_class}"
        profile = {
            "name": name,
            "namespace": self.namespace,
            "image": self.image,
            "storage": "{" + storage + "}",
            "ttl_seconds": "600",
        }
        # An output for each run, as runs with one output share what they have prepared and scored.
        own = (f"name={name}", f"output={self.namespace}/{name}")
        return [*own, *(f"cluster.kubernetes.{key}={value}" for key, value in profile.items()), *more]

    def dpo_ray(self, *arguments: str, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Run `dpo-ray ARGUMENTS` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "dpo_ray", *arguments],
            env=self._environment(),
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def start(self, *arguments: str) -> Command:
        """Start `dpo-ray ARGUMENTS`."""
        process = subprocess.Popen(
            [sys.executable, "-m", "dpo_ray", *arguments],
            env=self._environment(),
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Command(process)

    @contextmanager
    def run(self, name: str, *overrides: str) -> Iterator[Command]:
        """Apply the quickstart and follow it; delete the run at the end of the `with` block."""
        file = str(ROOT / "pipelines" / "quickstart.yaml")
        command = self.start("kubernetes", "apply", file, *self.overrides(name, *overrides), "--wait")
        try:
            yield command
        finally:
            command.process.kill()
            self.dpo_ray("kubernetes", "delete", name, "--namespace", self.namespace)

    def pods(self, name: str, group: str | None = None) -> list[Json]:
        """Return the pods of a run that are not being deleted, of one group of the recipe or of all."""
        labels = f"dpo-ray/run={name}" + (f",ray.io/group={group}" if group else "")
        listed = self.connection.objects(POD, self.namespace, labels=labels)
        return [pod for pod in listed if not pod["metadata"].get("deletionTimestamp")]

    def kill(self, name: str, group: str) -> str:
        """Kill a pod of a group at once; return its name."""
        pod = self.pods(name, group)[0]["metadata"]["name"]
        self.connection.delete(POD, self.namespace, pod, grace_seconds=0)
        return pod

    def job(self, name: str) -> Json:
        """Return the RayJob of a run."""
        found = self.connection.get(RAY_JOB, self.namespace, name)
        assert found is not None, name
        return found

    def _environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DPO_RAY_")) and k != "COLUMNS"}
        return clean | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"} | self.environment


def until(what: str, condition: Callable[[], Any], seconds: float, pause: float = 0.5) -> Any:
    """Wait until a condition returns something true; return that."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(pause)
    return found
