"""Strike a run with every fault in every stage: it ends with one error, or not at all, and the same command goes on.

A row of the matrix is a fault, a column a stage. CI runs the column `train`; `make test-long` runs all of them. The
results are in docs/guarantees.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

CLOCK = Path(__file__).resolve().parents[1] / "helpers" / "stepped_clock.c"
END_SECONDS = 150  # from the fault to the end of the command, on a loaded machine
STEP_SECONDS = 7200
STOP_SECONDS = 8

RECIPE: dict[str, Any] = {
    "name": "matrix",
    "model": {"path": "builtin:sentiment_llama"},
    "data": {
        "train": {"type": "synthetic", "pairs": 160},
        "eval": {"type": "synthetic", "pairs": 32},
        "chat_template": "plain",
        "max_length_tokens": 128,
    },
    "train": {
        "workers": 1,
        "objective": {"type": "simpo"},
        "groups_per_step": 8,
        "optimizer": {"learning_rate": 3e-4},
        "checkpoint_every_steps": 4,
    },
    "evaluate": {"sample_prompts": 0},
}
# With engines, which take most of the time: for the stages that need them.
WITH_ENGINES = {
    "reference": {"groups_per_granule": 32, "audit": {"groups": 16}},
    "train": {**RECIPE["train"], "objective": {"type": "sigmoid"}},
    "evaluate": {"sample_prompts": 16, "max_new_tokens": 48},
}
ONLINE = {
    "rounds": 1,
    "prompts_per_round": 32,
    "sampling": {"samples_per_prompt": 2, "max_new_tokens": 48, "prompts_per_granule": 8},
    "judge": {"type": "function", "function": "dpo_ray.data.synthetic.true_rewards"},
    "evaluate": {"prompts": 12},
}
ORDER = ("shard", "prepare", "reference", "schedule", "train", "evaluate")
# What shows that a stage is under way: files below the output directory, or a line on the terminal.
STAGES = {
    "prepare": "artifacts/.staging/matrix/shard-*/groups/*.parquet",
    "reference": "reference-store/*/segment-*.parquet",
    "schedule": "artifacts/.staging/matrix/schedule-*",
    "train": "matrix/checkpoints/*/step-*.json",
    "evaluate": "evaluate: started",
    "round": "matrix/samples/*/*",
}


def kind_of(stage: str) -> str:
    """Return the kind of recipe with which a stage is tried."""
    return {"reference": "engines", "evaluate": "engines", "round": "rounds"}.get(stage, "no engines")


def recipe_for(stage: str) -> dict[str, Any]:
    more = {"no engines": {}, "engines": WITH_ENGINES, "rounds": WITH_ENGINES | {"online": ONLINE}}
    return RECIPE | more[kind_of(stage)]


def done_before(stage: str) -> tuple[str, ...]:
    """Return the kinds of artifacts that exist when a stage begins."""
    if stage in ("prepare", "round"):
        return ()
    return ORDER[: ORDER.index(stage)]


@dataclass
class Run:
    """A directory in which the same command is run until it ends by itself."""

    root: Path
    stage: str
    mounts: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True)
        recipe = recipe_for(self.stage) | {"output": str(self.out)}
        (self.root / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "dpo_ray", "run", str(self.root / "recipe.yaml")]

    @property
    def clock(self) -> Path:
        """The file with the step of the run's wall clock, in seconds."""
        return self.root / "clock"

    @property
    def environment(self) -> dict[str, str]:
        library = self.root / "clock.so"
        stepped = {"LD_PRELOAD": str(library), "STEPPED_CLOCK": str(self.clock)} if library.exists() else {}
        return os.environ | stepped

    def use_stepped_clock(self) -> None:
        """Compile a wall clock that the test can step, for this run alone."""
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("there is no C compiler for a clock that can be stepped")
        self.set_clock(0.0)
        built = [compiler, "-shared", "-fPIC", "-O2", "-o", str(self.root / "clock.so"), str(CLOCK)]
        subprocess.run(built, check=True)

    def set_clock(self, step_seconds: float) -> None:
        """Write in place: the run's processes have mapped the file."""
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:
            file.write(struct.pack("<d", step_seconds))

    def finish(self) -> None:
        done = subprocess.run(self.command, env=self.environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    def policy(self) -> str:
        """Return the digest of the trained weights."""
        (file,) = self.out.glob("artifacts/train-*/policy/model.safetensors")
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def mount(self, *arguments: str) -> None:
        """Mount something over the output directory; skip the test where the system does not allow it."""
        done = subprocess.run(["mount", *arguments, str(self.out)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this user cannot mount: {done.stderr.strip()}")
        self.mounts += 1

    def unmount(self) -> None:
        """Remove the topmost mount, also if processes that are about to end still use it."""
        subprocess.run(["umount", "--lazy", str(self.out)], check=True)
        self.mounts -= 1


def mount_disk(run: Run) -> None:
    """Mount a small disk, which only this run uses, at the output directory."""
    run.mount("-t", "tmpfs", "-o", "size=256m", "output")


def child(driver: psutil.Process, name: str) -> psutil.Process:
    """Find a process of the Ray that a driver has started."""
    (found,) = [p for p in driver.children(recursive=True) if name in p.name()]
    return found


def fill(run: Run, driver: psutil.Process) -> None:
    """Write to the disk until it is full, again and again: what a failing write gives back is taken as well."""
    with (run.out / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def free(run: Run) -> None:
    (run.out / "filler").unlink()


def make_read_only(run: Run, driver: psutil.Process) -> None:
    subprocess.run(["mount", "--bind", str(run.out), str(run.out)], check=True)
    run.mounts += 1
    subprocess.run(["mount", "-o", "remount,bind,ro", str(run.out)], check=True)


def take_away(run: Run, driver: psutil.Process) -> None:
    """Leave an empty directory, as a network file system does that is unmounted."""
    run.mount("-t", "tmpfs", "-o", "size=64m", "empty")


def step_clock(run: Run, driver: psutil.Process) -> None:
    """Step the wall clock forward, and a little later back beyond where it was."""
    run.set_clock(STEP_SECONDS)
    time.sleep(3)
    run.set_clock(-STEP_SECONDS)


def stop_and_continue(run: Run, driver: psutil.Process) -> None:
    driver.send_signal(signal.SIGSTOP)
    time.sleep(STOP_SECONDS)
    driver.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Fault:
    """What strikes a run, the exit codes that it may have, words of its error, and what mends it."""

    strike: Callable[[Run, psutil.Process], None]
    exit_codes: tuple[int, ...]
    words: tuple[str, ...] = ()
    mend: Callable[[Run], None] = lambda run: None
    begin: Callable[[Run], None] = lambda run: None  # before the run starts


FAULTS = {
    "disk full": Fault(fill, (4,), ("No space left on device", "free space"), free, mount_disk),
    "read-only": Fault(make_read_only, (4,), ("Read-only file system",), Run.unmount, mount_disk),
    "storage gone": Fault(take_away, (4,), ("is gone",), Run.unmount, mount_disk),
    "GCS killed": Fault(
        lambda run, driver: child(driver, "gcs_server").kill(), (9,), ("Ray's head", "run the same command again")
    ),
    "raylet killed": Fault(
        lambda run, driver: child(driver, "raylet").kill(), (9,), ("Ray's", "run the same command again")
    ),
    "clock stepped": Fault(step_clock, (0,), begin=Run.use_stepped_clock),
    "driver stopped": Fault(stop_and_continue, (0,)),
    "driver killed": Fault(lambda run, driver: driver.kill(), (-signal.SIGKILL,)),
}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Make a run that nothing disturbs, once for each kind of recipe."""
    runs: dict[str, Run] = {}

    def make(stage: str) -> Run:
        kind = kind_of(stage)
        if kind not in runs:
            runs[kind] = Run(tmp_path_factory.mktemp("quiet"), stage)
            runs[kind].finish()
        return runs[kind]

    return make


@contextlib.contextmanager
def prepared(root: Path, stage: str, fault: Fault, quiet: Run) -> Iterator[Run]:
    """Make a run whose stages before `stage` are done; unmount at the end what the test has mounted."""
    run = Run(root, stage)
    try:
        fault.begin(run)
        for kind in done_before(stage):
            for artifact in quiet.out.glob(f"artifacts/{kind}-*"):
                shutil.copytree(artifact, run.out / "artifacts" / artifact.name)
        yield run
    finally:
        while run.mounts:
            run.unmount()


CELLS = [
    pytest.param(fault, stage, id=f"{fault}-{stage}", marks=() if stage == "train" else pytest.mark.long)
    for stage in STAGES
    for fault in FAULTS
]


@pytest.mark.parametrize(("fault_name", "stage"), CELLS)
def test_a_fault_in_a_stage_ends_in_one_error_and_the_same_command_goes_on(
    fault_name: str, stage: str, tmp_path: Path, quiet: Callable[[str], Run]
) -> None:
    fault, undisturbed = FAULTS[fault_name], quiet(stage)
    with prepared(tmp_path / "run", stage, fault, undisturbed) as run:
        with (tmp_path / "log").open("w+") as log:
            process = subprocess.Popen(run.command, env=run.environment, stdout=log, stderr=log)
            try:
                wait_for(run, process, tmp_path / "log")
                fault.strike(run, psutil.Process(process.pid))
                struck = time.monotonic()
                code = process.wait(END_SECONDS)
            finally:
                process.kill()
                process.wait()
        seconds, said = time.monotonic() - struck, (tmp_path / "log").read_text()
        print(f"{fault_name} | {stage} | exit {code} | {seconds:.0f} s | {error_in(said)}")  # pytest -rP shows it
        assert code in fault.exit_codes, said
        assert "Traceback" not in said
        assert said.count("error:") == (1 if code > 0 else 0), said
        assert all(words in said for words in fault.words), said
        fault.mend(run)
        if code:
            run.finish()
        if code > 0:  # Kubernetes keeps the last lines alone, so nothing of Ray may come after them, however late
            error, advice = (tmp_path / "log").read_text().splitlines()[-2:]
            assert error.startswith("error:"), said
            assert advice.startswith("  -> "), said
        assert run.policy() == undisturbed.policy()


def wait_for(run: Run, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the stage is under way."""
    deadline = time.monotonic() + 300
    sign = STAGES[run.stage]
    while not (any(run.out.glob(sign)) or sign in log.read_text()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def error_in(said: str) -> str:
    return next((line for line in said.splitlines() if line.startswith("error:")), "no error")
