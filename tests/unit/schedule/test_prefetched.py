"""Reading ahead: order and errors are those of plain iteration, and no thread outlives its reader."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dpo_ray.errors import ArtifactError
from dpo_ray.schedule.files import RankStep, filler, prefetched


def steps(count: int, error: BaseException | None = None) -> Iterator[RankStep]:
    for number in range(count):
        yield RankStep(number, 1.0, 3, (filler(),))
    if error is not None:
        raise error


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "schedule-prefetch"]


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_order_is_kept(depth: int) -> None:
    assert [s.step for s in prefetched(steps(20), depth)] == list(range(20))
    assert wait_until(lambda: not readers())


@pytest.mark.parametrize("error", [ArtifactError("gone"), KeyboardInterrupt()])
def test_errors_come_out_after_the_steps_before_them(error: BaseException) -> None:
    reading = prefetched(steps(3, error))
    assert [next(reading).step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error)) as raised:
        next(reading)
    assert raised.value is error
    assert wait_until(lambda: not readers())


def test_a_reader_that_stops_early_stops_the_thread() -> None:
    endless = steps(10**9)
    reading = prefetched(endless)
    assert next(reading).step == 0
    assert readers()
    reading.close()
    assert wait_until(lambda: not readers())


def test_it_reads_ahead_but_not_without_bound() -> None:
    taken: list[int] = []

    def source() -> Iterator[RankStep]:
        for step in steps(100):
            taken.append(step.step)
            yield step

    reading = prefetched(source(), depth=3)
    next(reading)
    assert wait_until(lambda: len(taken) >= 4)  # without being asked
    time.sleep(0.3)
    assert len(taken) <= 5  # one handed out, three waiting, one in the hand
    reading.close()
    assert wait_until(lambda: not readers())
