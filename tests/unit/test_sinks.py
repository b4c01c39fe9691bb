"""The live metrics: every step once, in order, through crashes and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.observe.sinks import MetricsSinks


def row(step: int, loss: float = 0.5) -> dict[str, float]:
    return {"step": step, "loss": loss}


def written(place: Path) -> list[tuple[int, float]]:
    lines = (place / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"]) for r in map(json.loads, lines)]


def test_each_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsSinks(Storage(tmp_path), ()) as sinks:
        sinks.begin(0)
        for step in (1, 2):
            sinks.write(row(step))
            assert [s for s, _ in written(tmp_path)] == list(range(1, step + 1))
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_replaces_what_it_measures_again(tmp_path: Path) -> None:
    with MetricsSinks(Storage(tmp_path), ()) as sinks:
        sinks.begin(0)
        for step in range(1, 8):
            sinks.write(row(step, 0.1))
    with MetricsSinks(Storage(tmp_path), ()) as sinks:
        sinks.begin(5)
        assert [s for s, _ in written(tmp_path)] == [1, 2, 3, 4, 5]
        for step in range(6, 10):
            sinks.write(row(step, 0.2))
    assert written(tmp_path) == [(s, 0.1) for s in range(1, 6)] + [(s, 0.2) for s in range(6, 10)]


def test_workers_that_begin_again_within_a_run_leave_no_step_twice(tmp_path: Path) -> None:
    with MetricsSinks(Storage(tmp_path), ("tensorboard",)) as sinks:
        sinks.begin(0)
        for step in range(1, 5):
            sinks.write(row(step, 0.1))
        sinks.begin(2)
        for step in (3, 4, 5):
            sinks.write(row(step, 0.2))
    assert written(tmp_path) == [(1, 0.1), (2, 0.1), (3, 0.2), (4, 0.2), (5, 0.2)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3'])
def test_a_line_torn_by_a_crash_is_passed_over(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n' + torn)
    with MetricsSinks(Storage(tmp_path), ()) as sinks:
        sinks.begin(2)
        sinks.write(row(3))
    assert [s for s, _ in written(tmp_path)] == [1, 2, 3]


def test_tensorboard_says_from_which_step_an_earlier_attempt_is_void(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    for first in (0, 2):
        with MetricsSinks(Storage(tmp_path), ("tensorboard",)) as sinks:
            sinks.begin(first)
            sinks.write(row(first + 1))
    events = [e for file in sorted((tmp_path / "tensorboard").iterdir()) for e in events_of(file, Event)]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    losses = [(e.step, v.tag) for e in events for v in e.summary.value]
    assert starts == [1, 3]
    assert losses == [(1, "loss"), (3, "loss")]


def events_of(file: Path, kind: type) -> list:
    """Read TFRecords: 8 bytes of length, 4 of checksum, the record, 4 of checksum."""
    data, events = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        events.append(kind.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events
