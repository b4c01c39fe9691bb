"""The live metrics: every step once, in order, through crashes and resumes."""

from __future__ import annotations

import json
from pathlib import Path

from dpo_ray.artifacts.storage import Storage
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
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


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
