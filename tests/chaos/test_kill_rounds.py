"""Rounds that are struck in every state, and lose a sampler, a judge and a training worker: the end is an undisturbed run's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.helpers.fakes.endpoint import Call, MadeEndpoint, Reply, longer_is_better, made_endpoint

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]  # in CI: tests/integration/test_rounds.py

CONCURRENCY = 2  # calls that are open at once: as many may be lost with a process
RECIPE = {
    "name": "rounds",
    "model": {"path": "builtin:sentiment_llama"},
    "data": {
        "train": {"type": "synthetic", "pairs": 256},
        "eval": {"type": "synthetic", "pairs": 48},
        "chat_template": "plain",
        "max_length_tokens": 128,
    },
    "reference": {"audit": {"groups": 16}, "groups_per_granule": 16},
    "train": {
        "workers": 2,
        "groups_per_step": 8,
        "optimizer": {"learning_rate": 3e-4},
        "checkpoint_every_steps": 2,
    },
}


def online(endpoint: MadeEndpoint) -> dict:
    return {
        "rounds": 2,
        "prompts_per_round": 64,
        "sampling": {"samples_per_prompt": 2, "max_new_tokens": 48, "prompts_per_granule": 16},
        "judge": {
            "type": "llm",
            "base_url": endpoint.base_url,
            "model": "made",
            "concurrency": CONCURRENCY,
            "questions_per_batch": 16,
        },
        "evaluate": {"prompts": 12},
    }


def slowly(call: Call, earlier: int) -> Reply:
    """Answer so that a judge is at work long enough to be struck."""
    time.sleep(0.02)
    return longer_is_better(call, earlier)


class Run:
    """A directory in which the same command is run until it ends by itself."""

    def __init__(self, root: Path, endpoint: MadeEndpoint) -> None:
        root.mkdir()
        self.root, self.out = root, root / "out"
        (root / "recipe.yaml").write_text(
            yaml.safe_dump(RECIPE | {"output": str(self.out), "online": online(endpoint)})
        )

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "dpo_ray", "run", str(self.root / "recipe.yaml")]
        with (self.root / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def finish(self) -> None:
        with self.started() as process:
            assert process.wait(900) == 0, self.log

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()

    def wait_for(self, reached: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 300
        while not reached():
            assert process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.005)

    def count(self, pattern: str) -> int:
        return len(list(self.out.glob(pattern)))

    def digests(self) -> dict[str, str]:
        """Hash what each artifact holds, and what it decided, by its directory's name."""
        found = {}
        for manifest in sorted(self.out.glob("artifacts/*/manifest.json")):
            said = json.loads(manifest.read_text())
            if said["stage"] == "train":
                held = [f["sha256"] for f in said["files"] if f["name"].endswith(".safetensors")]
            elif said["stage"] in ("sample", "pair") or said["stage"] == "judge":
                held = [f["sha256"] for f in said["files"]]
            elif said["stage"] == "promote":
                held = [json.dumps(said["figures"])]
            else:
                continue
            found[manifest.parent.name] = hashlib.sha256("".join(held).encode()).hexdigest()
        return found


def moments(run: Run) -> dict[str, Callable[[], object]]:
    """Name the states of both rounds by what they leave on the disk."""

    def there(pattern: str, count: int = 1) -> Callable[[], bool]:
        return lambda: run.count(pattern) >= count

    stages = ("judge", "pair", "reference", "train", "measure", "promote")
    states = {
        f"{stage} of round {n}": there(f"artifacts/{stage}-*/manifest.json", n) for n in (1, 2) for stage in stages
    }
    sampling = there("rounds/samples/*/granule-*.parquet")
    judging = there("judgements/*/*")
    training = there("rounds/checkpoints/*/step-*.json")
    return {"sampling": sampling, "judging": judging, "training": training, **states}


@dataclass(frozen=True)
class Quiet:
    """A run that nothing disturbed, and the endpoint that judged it."""

    endpoint: MadeEndpoint
    digests: dict[str, str]
    asked: set[Call]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quiet]:
    with made_endpoint(slowly) as endpoint:
        run = Run(tmp_path_factory.mktemp("quiet") / "run", endpoint)
        run.finish()
        yield Quiet(endpoint, run.digests(), set(endpoint.asked))


def test_a_driver_killed_in_every_state_ends_as_an_undisturbed_one(quiet: Quiet, tmp_path: Path) -> None:
    assert len([name for name in quiet.digests if name.startswith("train-")]) == 2
    endpoint = quiet.endpoint
    endpoint.asked.clear()
    endpoint.answered.clear()
    struck, kills = Run(tmp_path / "struck", endpoint), 0
    kept: dict[str, int] = {}
    for name, reached in moments(struck).items():
        if reached():
            continue  # the kill before was late
        with struck.started() as process:
            struck.wait_for(reached, process)
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
        print(f"killed: {name}")
        for file, changed in kept.items():  # granules that were sampled are sampled no more
            path = Path(file)
            assert not path.exists() or path.stat().st_mtime_ns == changed
        kept = {str(f): f.stat().st_mtime_ns for f in struck.out.glob("rounds/samples/*/granule-*.parquet")}
    struck.finish()
    assert kills >= 12
    assert struck.digests() == quiet.digests
    assert set(endpoint.asked) == quiet.asked
    again = {call: count for call, count in endpoint.asked.items() if count > 1}
    assert len(again) <= CONCURRENCY * kills  # those that were open as their judge was killed
    assert max(endpoint.answered.values()) <= 2
    repeated = sum(count > 1 for count in endpoint.answered.values())
    assert repeated <= CONCURRENCY  # answered in the very moment of a kill


def processes_of(driver: int, title: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


@pytest.mark.parametrize(
    "title",
    ["ray::Engine.sample", "ray::JudgeActor.judge", "ray::RayTrainWorker"],
)
def test_a_lost_sampler_judge_or_trainer_costs_its_work_alone(title: str, quiet: Quiet, tmp_path: Path) -> None:
    endpoint = quiet.endpoint
    endpoint.asked.clear()
    struck = Run(tmp_path / "struck", endpoint)
    with struck.started() as driver:
        at_work: list[psutil.Process] = []

        def found() -> bool:
            at_work[:] = processes_of(driver.pid, title)
            training = struck.count("rounds/checkpoints/*/step-*.json") > 0
            return bool(at_work) and (training or "Train" not in title)

        struck.wait_for(found, driver)
        os.kill(at_work[0].pid, signal.SIGKILL)
        assert driver.wait(900) == 0, struck.log
    assert struck.digests() == quiet.digests
    assert sum(count - 1 for count in endpoint.asked.values()) <= CONCURRENCY
