"""Scorers that tell, by waiting, whether training runs while they score; and that give up a sequence on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_ray.errors import EngineError
from dpo_ray.reference.engine import start_vllm
from dpo_ray.reference.scorer import Scorer, ScoreRequest, ScorerSettings

PATIENCE_SECONDS = 1200.0


class HoldBack:
    """Starts vLLM. After so many sequences, scores no more until training has measured a step.

    A run in which training waited for the end of scoring would end with an error.
    """

    def __init__(self, metrics: Path, sequences: int, *, then_gives_up: bool = False) -> None:
        self._metrics, self._sequences, self._then_gives_up = metrics, sequences, then_gives_up

    def __call__(self, settings: ScorerSettings) -> Scorer:
        return HeldBack(start_vllm(settings), self._metrics, self._sequences, self._then_gives_up)


class HeldBack:
    def __init__(self, scorer: Scorer, metrics: Path, sequences: int, gives_up: bool) -> None:
        self._scorer, self._metrics, self._left, self._gives_up = scorer, metrics, sequences, gives_up

    @property
    def cached_tokens(self) -> int:
        return self._scorer.cached_tokens

    @property
    def rescored(self) -> int:
        return self._scorer.rescored

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | None]:
        is_held = self._left <= 0
        self._left -= len(requests)
        if is_held:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not (self._metrics.exists() and self._metrics.stat().st_size):
                if time.monotonic() > deadline:
                    raise EngineError("training has not begun")
                time.sleep(0.1)
        scores = self._scorer.score(requests)
        return [None, *scores[1:]] if is_held and self._gives_up else scores

    def close(self) -> None:
        self._scorer.close()
