"""What a scorer is: token ids in, the log-prob of every completion token out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from .sampling import Sampling


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
    """Score completions of a frozen model. Holds the model; closing frees it.

    The counters only grow, from 0 when the scorer starts; what the sequences of one call came to is a difference.
    """

    cached_tokens: (
        int  # prompt tokens that were not computed again but read from a cache, once for each sequence scored
    )
    rescored: int  # sequences that went through a second time, because of what reading the cache had made of them

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | None]:
        """Return float32 [completion tokens] for each request, in the order given; all are finite and at most 0.

        None stands for a sequence of which the model gives no finite log-probs; the others are not touched by it.

        Raises:
            EngineError: a sequence is empty or longer than `max_length_tokens`, or the answer is not about its tokens.
        """
        ...

    def load(self, settings: ScorerSettings) -> bool:
        """Score with the model that `settings` name from now on; False where only a new scorer can."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[tuple[list[int], bool]]]:
        """Return for each prompt, of each seed, the sampled token ids and whether they end with a stop token."""
        ...

    def close(self) -> None: ...
