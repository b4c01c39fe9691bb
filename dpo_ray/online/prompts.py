"""The prompts of online rounds as token ids: those to sample for, and those to measure by."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.tables import read_table
from dpo_ray.data.schemas import eval_splits
from dpo_ray.reference.sampling import prompt_key


@dataclass(frozen=True)
class Prompt:
    """A prompt, and its reference answer if its row has one."""

    ids: tuple[int, ...]
    answer: str | None = None

    @property
    def key(self) -> bytes:
        """Return the hash of the prompt's content, 16 bytes."""
        return prompt_key(self.ids)


def training_prompts(tokens: Artifact) -> list[Prompt]:
    """List the distinct prompts of a tokens artifact's training groups, in order."""
    prompts: dict[tuple[int, ...], None] = {}
    for name in tokens.names("train/"):
        prompts |= dict.fromkeys(map(tuple, read_table(tokens, name, ["prompt_ids"])["prompt_ids"].to_pylist()))
    return [Prompt(ids) for ids in prompts]


def heldout_keys(tokens: Artifact) -> set[bytes]:
    """Return the keys of all prompts of held-out groups: no round samples for them."""
    names = [name for split in eval_splits(tokens) for name in tokens.names(f"{split}/")]
    return {prompt_key(ids) for n in names for ids in read_table(tokens, n, ["prompt_ids"])["prompt_ids"].to_pylist()}
