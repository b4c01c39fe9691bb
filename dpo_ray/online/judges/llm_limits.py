"""Limits of the cost and of the rate of a judge's calls. Several threads may share one limit."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from dpo_ray.config.judge import LlmJudge
from dpo_ray.errors import JudgeError

from .protocol import Spending, Usage


class Pace:
    """Spreads calls over time: at most a given number per minute, and no call while the endpoint requests a pause."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval_seconds = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def reserve(self) -> float:
        """Reserve the next free moment for one call; return how many seconds the caller must wait until then."""
        with self._lock:
            now = time.monotonic()
            moment = max(self._next, now)
            self._next = moment + self._interval_seconds
            return moment - now

    def hold(self, seconds: float) -> None:
        """Delay all calls that are reserved later: none of them may start before `seconds` have passed."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Budget:
    """Counts the cost of a judge's answers, and checks it against the limit `max_usd`."""

    def __init__(self, config: LlmJudge, spending: Spending, where: str) -> None:
        self._config, self._spending, self._where = config, spending, where
        self._usage, self._lock = Usage(), threading.Lock()

    @property
    def usage(self) -> Usage:
        return self._usage

    def answered(self, input_tokens: int, output_tokens: int) -> None:
        """Count one answer of the endpoint. An answer that cannot be used counts too, because it must be paid for."""
        usd = input_tokens * self._config.usd_per_million_input_tokens / 1e6
        usd += output_tokens * self._config.usd_per_million_output_tokens / 1e6
        self._spending.add(usd)
        with self._lock:
            self._usage += Usage(1, 0, input_tokens, output_tokens, usd)

    def retried(self) -> None:
        with self._lock:
            self._usage = replace(self._usage, retries=self._usage.retries + 1)

    def check(self) -> None:
        """Check that the round has spent less than `max_usd`.

        Calls that are in flight at that time still cost money; their answers are stored.

        Raises:
            JudgeError: `max_usd` is spent.
        """
        limit = self._config.max_usd
        if limit is not None and self._spending.usd >= limit:
            raise JudgeError(
                f"max_usd={limit:g} is spent: this round has cost {self._spending.usd:.4g} USD",
                where=self._where,
                fix="raise online.judge.max_usd and run the same command again: all answers up to now are stored",
            )
