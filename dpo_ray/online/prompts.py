"""The prompts that rounds sample for, and those that they are measured on, as token ids."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.tables import read_table
from dpo_ray.data.schemas import eval_splits
from dpo_ray.reference.sampling import prompt_key


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the answer that its row gives to it, where it gives one."""

    ids: tuple[int, ...]
    answer: str | None = None

    @property
    def key(self) -> bytes:
        """Name it by its content, 16 bytes."""
        return prompt_key(self.ids)


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
