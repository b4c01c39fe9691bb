"""The live metrics: every step once, in order, through crashes and resumes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_ray.artifacts import storage as storage_module
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import TrainError, WriteRefusedError
from dpo_ray.observe import sinks as sinks_module
from dpo_ray.observe.sinks import MetricsSinks


def row(step: int, loss: float = 0.5) -> dict[str, float]:
    return {"step": step, "loss": loss}


def written(place: Path) -> list[tuple[int, float]]:
    lines = (place / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines)]


def test_each_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsSinks(Storage(tmp_path), ()) as sinks:
        sinks.begin([])
        for step in (1, 2):
            sinks.write(row(step))
            assert [s for s, _ in written(tmp_path)] == list(range(1, step + 1))
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_replaces_what_it_measures_again(tmp_path: Path) -> None:
    with MetricsSinks(Storage(tmp_path), ()) as sinks:
        sinks.begin([])
        for step in range(1, 8):
            sinks.write(row(step, 0.1))
    with MetricsSinks(Storage(tmp_path), ()) as sinks:
        sinks.begin([row(s, 0.1) for s in range(1, 6)])
        assert [s for s, _ in written(tmp_path)] == [1, 2, 3, 4, 5]
        for step in range(6, 10):
            sinks.write(row(step, 0.2))
    assert written(tmp_path) == [(s, 0.1) for s in range(1, 6)] + [(s, 0.2) for s in range(6, 10)]


def test_workers_that_begin_again_within_a_run_leave_no_step_twice(tmp_path: Path) -> None:
    with MetricsSinks(Storage(tmp_path), ("tensorboard",)) as sinks:
        sinks.begin([])
        for step in range(1, 5):
            sinks.write(row(step, 0.1))
        sinks.begin([row(1, 0.1), row(2, 0.1)])
        for step in (3, 4, 5):
            sinks.write(row(step, 0.2))
    assert written(tmp_path) == [(1, 0.1), (2, 0.1), (3, 0.2), (4, 0.2), (5, 0.2)]
    files = list((tmp_path / "tensorboard").iterdir())
    assert [oct(path.stat().st_mode) for path in (tmp_path / "tensorboard", *files)] == ["0o40700"] + 2 * ["0o100600"]


def test_what_the_file_held_before_does_not_count(tmp_path: Path) -> None:
    """A line torn by a crash, a step that was lost, steps of another recipe: the checkpoint's rows are the truth."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 9}\n{"step": 7, "loss": 9}\n{"step": 8, "lo')
    with MetricsSinks(Storage(tmp_path), ()) as sinks:
        sinks.begin([row(1), row(2)])
        sinks.write(row(3))
    assert written(tmp_path) == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_tensorboard_has_every_step_after_a_resume_and_hides_earlier_attempts(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    for known in ([], [row(1), row(2)]):
        with MetricsSinks(Storage(tmp_path), ("tensorboard",)) as sinks:
            sinks.begin(known)
            sinks.write(row(len(known) + 1))
    first, second = (events_of(file, Event) for file in sorted((tmp_path / "tensorboard").iterdir()))
    for events in (first, second):
        assert [e.step for e in events if e.session_log.status == SessionLog.START] == [0]
    assert [e.step for e in first for _ in e.summary.value] == [1]
    assert [e.step for e in second for _ in e.summary.value] == [1, 2, 3]


def events_of(file: Path, kind: type) -> list:
    """Read TFRecords: 8 bytes of length, 4 of checksum, the record, 4 of checksum."""
    data, events = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        events.append(kind.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


class Failing:
    """A tracker that raises or hangs in one of its methods."""

    def __init__(self, run_dir: Storage, where: str, how: Callable[[], None]) -> None:
        self._where, self._how = where, how
        self._at("init")

    def begin(self, known: object) -> None:
        self._at("begin")

    def write(self, row: object) -> None:
        self._at("write")

    def close(self) -> None:
        self._at("close")

    def _at(self, method: str) -> None:
        if method == self._where:
            self._how()


def full() -> None:
    raise OSError(28, "No space left on device")


def hang() -> None:
    threading.Event().wait()


@pytest.mark.parametrize("how", [full, hang])
@pytest.mark.parametrize("where", ["init", "begin", "write", "close"])
def test_a_tracker_that_fails_or_hangs_costs_nothing_but_itself(
    where: str, how: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sinks_module.TRACKERS, "bad", lambda run_dir: Failing(run_dir, where, how))
    monkeypatch.setattr(sinks_module, "CLOSE_SECONDS", 0.2)
    said: list[str] = []
    with MetricsSinks(Storage(tmp_path), ("bad", "tensorboard"), said.append) as sinks:
        sinks.begin([])
        for step in range(1, 50):
            sinks.write(row(step))
    assert [s for s, _ in written(tmp_path)] == list(range(1, 50))
    assert len(said) == 1
    assert said[0].startswith("the tracker bad stopped, and the run goes on without it: ")
    assert ("No space left" in said[0]) == (how is full)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_falls_far_behind_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sinks_module.TRACKERS, "bad", lambda run_dir: Failing(run_dir, "begin", hang))
    monkeypatch.setattr(sinks_module, "MOST_PENDING_CALLS", 10)
    monkeypatch.setattr(sinks_module, "CLOSE_SECONDS", 0.2)
    said: list[str] = []
    with MetricsSinks(Storage(tmp_path), ("bad",), said.append) as sinks:
        sinks.begin([])
        for step in range(1, 50):
            sinks.write(row(step))
    assert said == ["the tracker bad stopped, and the run goes on without it: it is 10 calls behind"]


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_full_disk_is_one_error_and_hides_no_earlier_one(
    in_flight: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "write", lambda self, name, data: self.append(name, data))
    monkeypatch.setattr(storage_module, "open", lambda *_, **__: full(), raising=False)
    expected = TrainError if in_flight else WriteRefusedError

    def train() -> None:
        with MetricsSinks(Storage(tmp_path), ()) as sinks:
            sinks._rows = {1: row(1)}
            if in_flight:
                raise TrainError("the cause")
            sinks.write(row(2))

    with pytest.raises(expected):
        train()


def test_a_board_that_failed_prints_nothing_when_python_exits(tmp_path: Path) -> None:
    """A limit for the size of files stands for a full disk."""
    program = f"""
import resource
from pathlib import Path
from dpo_ray.artifacts.storage import Storage
from dpo_ray.observe.sinks import TensorBoard

board = TensorBoard(Storage({str(tmp_path)!r}))
board.begin([{{"step": 1, "loss": 0.5}}])
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    board.write({{"step": 2, "loss": 0.25}})
    board.close()
except OSError as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "OSError\n"
    assert done.stderr == ""
