"""Scorers that a pool's engines start in place of vLLM, or around it; and granules for them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo_ray.errors import EngineError
from dpo_ray.reference.engine import start_vllm
from dpo_ray.reference.granule import GRANULE
from dpo_ray.reference.scorer import Scorer, ScoreRequest, ScorerSettings

DEADLY, BREAKING, UNSCORABLE = 90, 91, 92
"""First token of a prompt that ends the process; that raises; that has no log-probs."""


class ArithmeticScorer:
    """Log-probs by a formula, after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.cached_tokens = self.rescored = 0
        self._seconds = seconds

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | None]:
        time.sleep(self._seconds)
        firsts = {int(r.prompt_ids[0]) for r in requests}
        if DEADLY in firsts:
            os._exit(1)
        if BREAKING in firsts:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [
            None if r.prompt_ids[0] == UNSCORABLE else formula(r.prompt_ids.tolist(), r.completion_ids.tolist())
            for r in requests
        ]

    def close(self) -> None:
        pass


def formula(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> np.ndarray:
    return -(np.array(completion_ids, np.float32) + float(sum(prompt_ids))) / 1024


class CountingScorer:
    """A scorer around another that writes down how many sequences it has scored: one byte each, also if it is killed later.

    It scores nothing before so many scorers as `together` are ready.
    """

    def __init__(self, scorer: Scorer, directory: Path, together: int) -> None:
        self._scorer, self._log, self._together = scorer, directory / "scored", together
        self._ready = directory / "ready"
        with self._ready.open("ab") as ready:
            ready.write(b"x")

    @property
    def cached_tokens(self) -> int:
        return self._scorer.cached_tokens

    @property
    def rescored(self) -> int:
        return self._scorer.rescored

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | None]:
        while self._ready.stat().st_size < self._together:
            time.sleep(0.1)
        scores = self._scorer.score(requests)
        with self._log.open("ab") as log:
            log.write(b"x" * len(requests))
        return scores

    def close(self) -> None:
        self._scorer.close()


class Start:
    """Starts a scorer, and counts that in a directory."""

    def __init__(
        self, directory: Path, *, seconds: float = 0.0, vllm: bool = False, fault: str = "", together: int = 1
    ) -> None:
        self._directory, self._seconds, self._vllm, self._fault = directory, seconds, vllm, fault
        self._together = together

    def __call__(self, settings: ScorerSettings) -> Scorer:
        (self._directory / f"started-{os.getpid()}").touch()
        if self._fault == "exit":
            os._exit(1)
        if self._fault == "error":
            raise EngineError("the engine does not start", fix="look at the log")
        scorer = start_vllm(settings) if self._vllm else ArithmeticScorer(self._seconds)
        return CountingScorer(scorer, self._directory, self._together)

    @property
    def starts(self) -> int:
        return len(list(self._directory.glob("started-*")))

    @property
    def scored(self) -> int:
        """Count the sequences that were scored, by engines that are gone as well."""
        log = self._directory / "scored"
        return log.stat().st_size if log.exists() else 0


def granule(first: int, groups: int, rng: np.random.Generator, **firsts: int) -> pa.Table:
    """Make a granule of pairs on random token ids below 80; `firsts` maps a group (g3) to its prompt's first token."""
    rows = []
    for i in range(groups):
        prompt = rng.integers(5, 80, rng.integers(4, 40)).tolist()
        prompt[0] = firsts.get(f"g{i}", prompt[0])
        completions = [rng.integers(5, 80, rng.integers(1, 20)).tolist() for _ in range(2)]
        rows.append({"group_id": (first + i).to_bytes(16, "big"), "prompt_ids": prompt, "completion_ids": completions})
    return pa.Table.from_pylist(rows, schema=GRANULE)
