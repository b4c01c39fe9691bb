"""What is recorded is exported again and again until the run ends, and a failure of the exporter stops nothing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

import pytest

from dpo_ray.observe import recorder
from dpo_ray.observe.metrics import ENGINE_DEATHS, ENGINES, LEASE_HELD, STAGE_ACTIVE, TRAIN_NOT_FINITE, Metric
from dpo_ray.observe.progress import Reporter
from dpo_ray.observe.recorder import count, record, record_row, recording


class Exported:
    """An exporter that keeps all values; it fails if it is told to."""

    def __init__(self) -> None:
        self.set_values: list[tuple[str, float, dict[str, str]]] = []
        self.added: list[tuple[str, float, dict[str, str]]] = []
        self.fails = False

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        if self.fails:
            raise RuntimeError("the metrics agent is gone")
        self.set_values.append((metric.name, value, dict(labels)))

    def add(self, metric: Metric, amount: float, labels: Mapping[str, str]) -> None:
        self.added.append((metric.name, amount, dict(labels)))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "REPEAT_SECONDS", 0.01)


def wait_for(values: list, length: int) -> None:
    until = time.monotonic() + 10
    while len(values) < length:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_outside_of_a_run_nothing_is_exported_and_nothing_fails() -> None:
    record(LEASE_HELD, 1)
    count(ENGINE_DEATHS, during="work")


def test_gauges_are_set_again_with_their_last_value_until_the_run_ends() -> None:
    exported = Exported()
    with recording("a", exported):
        record(ENGINES, 1, state="idle")
        record(ENGINES, 2, state="idle")
        record(ENGINES, 7, state="busy")
        begun = len(exported.set_values)
        wait_for(exported.set_values, begun + 40)
    after = len(exported.set_values)
    assert {(value, labels["state"]) for _, value, labels in exported.set_values[begun:]} == {(2, "idle"), (7, "busy")}
    assert all(labels["run"] == "a" for _, _, labels in exported.set_values)
    record(ENGINES, 3, state="idle")
    time.sleep(0.05)
    assert len(exported.set_values) == after


def test_a_counter_is_added_to_once_and_an_amount_of_0_changes_nothing() -> None:
    exported = Exported()
    with recording("a", exported):
        count(ENGINE_DEATHS, during="start")
        count(TRAIN_NOT_FINITE, 0)
        time.sleep(0.05)
    assert exported.added == [("dpo_ray_engine_deaths_total", 1, {"run": "a", "during": "start"})]


def test_a_value_that_is_not_finite_ends_its_series() -> None:
    exported = Exported()
    with recording("a", exported):
        record_row({"loss": 0.5})
        wait_for(exported.set_values, 2)
        record_row({"loss": math.nan})
        before = len(exported.set_values)
        time.sleep(0.1)
        assert len(exported.set_values) == before


def test_columns_are_exported_in_base_units_and_unknown_ones_are_not() -> None:
    exported = Exported()
    with recording("a", exported):
        record_row({"step": 3, "memory_gib": 2.0, "rewards/accuracies/web": 0.5})
    assert {(name, value) for name, value, _ in exported.set_values} == {
        ("dpo_ray_train_step", 3),
        ("dpo_ray_train_memory_peak_bytes", 2 * 2**30),
    }


def test_an_exporter_that_fails_stops_nothing_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    exported = Exported()
    exported.fails = True
    with caplog.at_level(logging.WARNING), recording("a", exported):
        for _ in range(3):
            record(LEASE_HELD, 1)
        count(ENGINE_DEATHS, during="work")
    assert not exported.added
    assert [r.getMessage() for r in caplog.records] == [
        "metrics are no longer exported, and the run goes on without them: the metrics agent is gone"
    ]


def test_what_nobody_reports_is_looked_up_every_round() -> None:
    exported, held = Exported(), [1.0]
    with recording("a", exported, lambda: record(LEASE_HELD, held[0])):
        wait_for(exported.set_values, 2)
        held[0] = 0.0
        until = time.monotonic() + 10
        while exported.set_values[-1][1] != 0.0:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_stage_is_active_while_its_progress_is_shown_even_if_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "REPEAT_SECONDS", 100)
    exported = Exported()
    with (
        recording("a", exported),
        pytest.raises(ValueError, match="broken"),
        Reporter().stage("round 2: judge", "prompts"),
    ):
        raise ValueError("broken")
    assert exported.set_values == [
        (STAGE_ACTIVE.name, 1, {"run": "a", "stage": "judge"}),
        (STAGE_ACTIVE.name, 0, {"run": "a", "stage": "judge"}),
    ]
