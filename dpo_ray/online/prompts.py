"""The prompts that rounds sample for, and those that they are measured on, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.data.tokens import eval_splits, read_table
from dpo_ray.reference.sampling import PROMPTS, sample_seed


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the answer that its row gives to it, where it gives one."""

    ids: tuple[int, ...]
    answer: str | None = None

    @property
    def key(self) -> bytes:
        """Name it by its content, 16 bytes."""
        return prompt_key(self.ids)


def prompt_key(ids: Sequence[int]) -> bytes:
    """Hash a prompt's token ids to 16 bytes."""
    return hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16).digest()


def training_prompts(tokens: Artifact) -> list[Prompt]:
    """List the different prompts of a tokens artifact's training groups, in their order."""
    found: dict[tuple[int, ...], None] = {}
    for name in tokens.names("train/"):
        found |= dict.fromkeys(map(tuple, read_table(tokens, name, ["prompt_ids"])["prompt_ids"].to_pylist()))
    return [Prompt(ids) for ids in found]


def heldout_keys(tokens: Artifact) -> set[bytes]:
    """Name all prompts of held-out groups: no round samples for them."""
    names = [name for split in eval_splits(tokens) for name in tokens.names(f"{split}/")]
    return {prompt_key(ids) for n in names for ids in read_table(tokens, n, ["prompt_ids"])["prompt_ids"].to_pylist()}


def prompt_table(prompts: Sequence[Sequence[int]], seed: int, number: int, samples: int) -> pa.Table:
    """Make the table that engines sample for, of schema PROMPTS: `samples` completions of each prompt.

    Args:
        number: of the round, which the samples' seeds depend on; 0 for what policies are measured by.
    """
    keys = [prompt_key(ids) for ids in prompts]
    seeds = [[sample_seed(seed, number, key, k) for k in range(samples)] for key in keys]
    return pa.table({"group_id": keys, "prompt_ids": [list(p) for p in prompts], "seeds": seeds}, schema=PROMPTS)
