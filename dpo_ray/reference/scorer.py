"""The interface of a scorer, which computes the log-prob of every completion token from token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from .sampling import Sampling


@dataclass(frozen=True)
class ScoreRequest:
    """One prompt and one completion to score. Requests with the same `group` have the same prompt."""

    group: int
    prompt_ids: np.ndarray  # int32 [prompt tokens]
    completion_ids: np.ndarray  # int32 [completion tokens]


@dataclass(frozen=True)
class ScorerSettings:
    """Settings of a scorer, the same for every engine of a pool. Can be pickled."""

    engine: Literal["vllm", "trainer"]
    model_dir: str
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    max_length_tokens: int
    max_batched_tokens: int | None  # None: the scorer chooses a number of tokens whose logits fit in memory
    gpu_memory_fraction: float
    share_prompt: bool
    tensor_parallel: int = 1
    adapter_dir: str | None = None  # a LoRA adapter in PEFT's format


class Scorer(Protocol):
    """An object that holds a frozen model and scores completions with it. `close` frees the model.

    `cached_tokens` and `rescored` start at 0 and only grow. To get the count of one call, subtract the count before the
    call.
    """

    # Prompt tokens that were read from a cache instead of being computed again, summed over all sequences.
    cached_tokens: int
    rescored: int  # sequences that were scored again, because reading the cache gave no valid result

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | None]:
        """Return the log-probs of the completion of each request, in the same order: float32 [completion tokens].

        All log-probs are finite and at most 0. If the model gives no finite log-probs for a request, the result of this
        request is None; the other requests are not affected.

        Raises:
            EngineError: a prompt or completion is empty, both together are longer than `max_length_tokens`, or the
                result belongs to other tokens.
        """
        ...

    def load(self, settings: ScorerSettings) -> bool:
        """Load the model in `settings` and return True; return False if only a new scorer can load it."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[tuple[list[int], bool]]]:
        """Sample one completion for each seed of each prompt.

        Return the token ids of each completion, and whether it ends with a stop token.
        """
        ...

    def close(self) -> None: ...
