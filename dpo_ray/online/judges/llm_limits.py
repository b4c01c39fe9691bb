"""The limits on the cost and the rate of a judge's calls, shared by all its threads."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from dpo_ray.config.judge import LlmJudge
from dpo_ray.errors import JudgeError

from .protocol import Spending, Usage


class Pace:
    """The pacing of calls: they come no faster than the rate, and none comes while the endpoint requests a pause."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval_seconds = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def reserve(self) -> float:
        """Reserve the next moment for a call; return how many seconds to wait for it."""
        with self._lock:
            now = time.monotonic()
            moment = max(self._next, now)
            self._next = moment + self._interval_seconds
            return moment - now

    def hold(self, seconds: float) -> None:
        """Delay all calls by at least `seconds` from now."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Budget:
    """The cost of a judge's answers so far, and the check against its limit."""

    def __init__(self, config: LlmJudge, spending: Spending, where: str) -> None:
        self._config, self._spending, self._where = config, spending, where
        self._usage, self._lock = Usage(), threading.Lock()

    @property
    def usage(self) -> Usage:
        return self._usage

    def answered(self, input_tokens: int, output_tokens: int) -> None:
        """Count an answer, usable or not: it is paid for."""
        usd = input_tokens * self._config.usd_per_million_input_tokens / 1e6
        usd += output_tokens * self._config.usd_per_million_output_tokens / 1e6
        self._spending.add(usd)
        with self._lock:
            self._usage += Usage(1, 0, input_tokens, output_tokens, usd)

    def retried(self) -> None:
        with self._lock:
            self._usage = replace(self._usage, retries=self._usage.retries + 1)

    def check(self) -> None:
        """Raise JudgeError if `max_usd` is spent. Calls that are open by then are still paid for, and kept."""
        limit = self._config.max_usd
        if limit is not None and self._spending.usd >= limit:
            raise JudgeError(
                f"max_usd={limit:g} is spent: {self._spending.usd:.4g} USD in this round",
                where=self._where,
                fix="raise online.judge.max_usd and run the same command again: every answer so far is kept",
            )
