"""A process in which the tests start real vLLM engines, one after the other: an engine changes much that is global."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from dpo_ray.reference.scorer import ScoreRequest, ScorerSettings

_scorer: Any = None  # in the child alone


@dataclass(frozen=True)
class Answer:
    """What one call of `score` came to."""

    scores: list[np.ndarray | None]
    cached_tokens: int
    rescored: int


class EngineProcess:
    """Holds a child process; importing vLLM takes it long, starting an engine does not."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def start(self, settings: ScorerSettings, sharing_tolerance: float | None = None) -> None:
        """Start an engine; one that runs is closed before. `sharing_tolerance` is for the engine's check of its cache."""
        self._pool.submit(_start, settings, sharing_tolerance).result()

    def score(self, requests: Sequence[ScoreRequest]) -> Answer:
        return self._pool.submit(_score, requests).result()

    def shares_prompts(self) -> bool:
        return self._pool.submit(_shares_prompts).result()

    def close(self) -> None:
        self._pool.submit(_close).result()

    def pid(self) -> int:
        return self._pool.submit(os.getpid).result()

    def end(self) -> None:
        """End the child, if it is still there."""
        with contextlib.suppress(BrokenProcessPool):
            self.close()
        self._pool.shutdown()


def _start(settings: ScorerSettings, sharing_tolerance: float | None) -> None:
    global _scorer
    from dpo_ray.reference.vllm import scorer

    _close()
    usual = scorer.SHARING_TOLERANCE
    if sharing_tolerance is not None:
        scorer.SHARING_TOLERANCE = dict.fromkeys(usual, sharing_tolerance)
    try:
        _scorer = scorer.VllmScorer(settings)
    finally:
        scorer.SHARING_TOLERANCE = usual


def _close() -> None:
    global _scorer
    if _scorer is not None:
        _scorer.close()
    _scorer = None


def _score(requests: Sequence[ScoreRequest]) -> Answer:
    cached, rescored = _scorer.cached_tokens, _scorer.rescored
    scores = _scorer.score(requests)
    return Answer(scores, _scorer.cached_tokens - cached, _scorer.rescored - rescored)


def _shares_prompts() -> bool:
    return _scorer.share_prompt


def engine_processes(pid: int) -> list[psutil.Process]:
    """List the processes of the engine that runs in process `pid`, without that process."""
    descendants = psutil.Process(pid).children(recursive=True)
    return [p for p in descendants if "resource_tracker" not in " ".join(p.cmdline())]
