"""What a scorer is: token ids in, the log-prob of every completion token out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np


@dataclass(frozen=True)
class ScoreRequest:
    """One prompt and one completion; `group` tells which requests share their prompt."""

    group: int
    prompt_ids: np.ndarray  # int32 [prompt tokens]
    completion_ids: np.ndarray  # int32 [completion tokens]


@dataclass(frozen=True)
class ScorerSettings:
    """How to set up a scorer; the same for every engine of a pool. Pickles."""

    engine: Literal["vllm", "trainer"]
    model_dir: str
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    max_length_tokens: int
    max_batched_tokens: int | None  # None: the scorer chooses what its logits leave room for
    gpu_memory_fraction: float
    share_prompt: bool
    tensor_parallel: int = 1
    adapter_dir: str | None = None  # a LoRA adapter in PEFT's format


class Scorer(Protocol):
    """Score completions of a frozen model. Holds the model; closing frees it."""

    cached_tokens: int  # prompt tokens that were read from the engine's cache, since it started

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        """Return float32 [completion tokens] for each request, in the order given."""
        ...

    def close(self) -> None: ...
