"""Two things side by side: each waits for the other where it must, and neither outlives the other's error."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from dpo_ray.errors import InfrastructureError, TrainError
from dpo_ray.reference.streaming import Stopped
from dpo_ray.run.streaming import run_side_by_side

PATIENCE_SECONDS = 30.0

Event = threading.Event


def never(reason: str) -> None:
    raise AssertionError(reason)


def test_training_begins_before_scoring_ends_and_both_results_come_back() -> None:
    is_training = Event()

    def score(began: Event, stop: Event) -> str:
        began.set()
        assert is_training.wait(PATIENCE_SECONDS)  # would fail if training waited for the end of scoring
        return "scores"

    def train(wait: Callable[[], str]) -> str:
        is_training.set()
        return f"policy after {wait()}"

    assert run_side_by_side(score, train, never) == ("scores", "policy after scores")


def test_training_does_not_begin_before_scoring_has() -> None:
    order: list[str] = []

    def score(began: Event, stop: Event) -> None:
        order.append("pool")
        began.set()

    run_side_by_side(score, lambda wait: order.append("train"), never)
    assert order == ["pool", "train"]


def test_an_error_of_scoring_ends_training_and_is_what_is_raised() -> None:
    is_training, failed = Event(), Event()
    reasons: list[str] = []

    def score(began: Event, stop: Event) -> None:
        began.set()
        assert is_training.wait(PATIENCE_SECONDS)
        raise InfrastructureError("engines die", where="reference")

    def train(wait: Callable[[], None]) -> None:
        is_training.set()
        assert failed.wait(PATIENCE_SECONDS)
        raise TrainError("no further steps")

    def fail(reason: str) -> None:
        reasons.append(reason)
        failed.set()

    with pytest.raises(InfrastructureError, match="engines die") as raised:
        run_side_by_side(score, train, fail)
    assert reasons == ["reference: engines die"]
    assert isinstance(raised.value.__cause__, TrainError)


def test_an_error_before_anything_is_scored_starts_no_training() -> None:
    def score(began: Event, stop: Event) -> None:
        raise InfrastructureError("no engine starts")

    def train(wait: Callable[[], None]) -> None:
        raise AssertionError("training has begun")

    with pytest.raises(InfrastructureError, match="no engine starts"):
        run_side_by_side(score, train, lambda reason: None)


@pytest.mark.parametrize("error", [TrainError("not finite"), KeyboardInterrupt()])
def test_an_error_of_training_stops_scoring(error: BaseException) -> None:
    stopped: list[bool] = []

    def score(began: Event, stop: Event) -> None:
        began.set()
        stopped.append(stop.wait(PATIENCE_SECONDS))
        raise Stopped

    def train(wait: Callable[[], None]) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        run_side_by_side(score, train, never)
    assert raised.value is error
    assert stopped == [True]
    assert not [t for t in threading.enumerate() if t.name == "scoring"]


def test_training_that_ends_first_waits_for_what_is_still_scored() -> None:
    ended = Event()

    def score(began: Event, stop: Event) -> str:
        began.set()
        assert ended.wait(PATIENCE_SECONDS)
        return "all"

    def train(wait: Callable[[], str]) -> str:
        ended.set()
        return "policy"

    assert run_side_by_side(score, train, never) == ("all", "policy")
