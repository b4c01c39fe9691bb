"""The protocol of a scorer, which computes the log-prob of every completion token from token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from .sampling import Sampling


@dataclass(frozen=True)
class ScoreRequest:
    """One prompt and one completion; requests with the same `group` share their prompt."""

    group: int
    prompt_ids: np.ndarray  # int32 [prompt tokens]
    completion_ids: np.ndarray  # int32 [completion tokens]


@dataclass(frozen=True)
class ScorerSettings:
    """Settings of a scorer; the same for every engine of a pool. Pickles."""

    engine: Literal["vllm", "trainer"]
    model_dir: str
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    max_length_tokens: int
    max_batched_tokens: int | None  # None: the scorer chooses a value for which its logits fit in memory
    gpu_memory_fraction: float
    share_prompt: bool
    tensor_parallel: int = 1
    adapter_dir: str | None = None  # a LoRA adapter in PEFT's format


class Scorer(Protocol):
    """An object that scores completions with a frozen model. It holds the model; `close` frees it.

    The counters only grow, from 0 when the scorer starts; the count for one call is a difference.
    """

    # Prompt tokens that were read from a cache instead of computed again; they count for each sequence scored.
    cached_tokens: int
    rescored: int  # sequences that were scored a second time, because reading the cache had spoilt their result

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | None]:
        """Return float32 [completion tokens] for each request, in the order given; all are finite and at most 0.

        None stands for a sequence for which the model gives no finite log-probs; it does not affect the others.

        Raises:
            EngineError: a sequence is empty or longer than `max_length_tokens`, or the answer is for other tokens.
        """
        ...

    def load(self, settings: ScorerSettings) -> bool:
        """Switch to the model in `settings`; return False if only a new scorer can do that."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[tuple[list[int], bool]]]:
        """Return, for each prompt and each seed, the sampled token ids and whether they end with a stop token."""
        ...

    def close(self) -> None: ...
