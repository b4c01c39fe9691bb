"""Prompts as token ids: rounds sample for the training prompts, and never for the held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.tables import read_table
from dpo_ray.data.schemas import eval_splits
from dpo_ray.reference.sampling import prompt_key


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, with its reference answer if there is one."""

    ids: tuple[int, ...]
    answer: str | None = None

    @property
    def key(self) -> bytes:
        """Return a hash of 16 bytes of the prompt's token ids."""
        return prompt_key(self.ids)


def training_prompts(tokens: Artifact) -> list[Prompt]:
    """List the different prompts of the training groups of a tokens artifact, in the order of the groups."""
    prompts: dict[tuple[int, ...], None] = {}
    for name in tokens.names("train/"):
        prompts |= dict.fromkeys(map(tuple, read_table(tokens, name, ["prompt_ids"])["prompt_ids"].to_pylist()))
    return [Prompt(ids) for ids in prompts]


def heldout_keys(tokens: Artifact) -> set[bytes]:
    """Return the keys (hashes) of all prompts of held-out groups. Rounds do not sample for these prompts."""
    names = [name for split in eval_splits(tokens) for name in tokens.names(f"{split}/")]
    return {prompt_key(ids) for n in names for ids in read_table(tokens, n, ["prompt_ids"])["prompt_ids"].to_pylist()}
