"""The prompts of a run: those for which rounds sample, and the held-out prompts on which policies are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.data.tokenizing.chat import load_tokenizer, resolve_template
from dpo_ray.data.tokenizing.tokenize import stop_tokens
from dpo_ray.errors import ConfigError
from dpo_ray.evaluate.stage import heldout_prompts
from dpo_ray.models.load import context_tokens, model_directory
from dpo_ray.run.planning import Plan

from .prompt_choice import prompts_of_round
from .prompt_source import read_prompts
from .prompts import Prompt, heldout_keys, training_prompts
from .round_plan import online_of


class RoundPrompts:
    """All prompts of a run and their texts. Each kind of prompts is read when it is first needed."""

    def __init__(self, plan: Plan, prepared: Artifact, source: Artifact | None, say: Callable[[str], None]) -> None:
        """Store the inputs; nothing is read yet.

        Args:
            prepared: the tokens artifact of the preference data.
            source: the artifact `prompts`, if the recipe has the field `online.prompts`; otherwise None.
            say: called with a message about prompts that are left out.
        """
        self._plan, self._online, self._prepared, self._source = plan, online_of(plan.recipe), prepared, source
        self._say = say
        self._model_directory = model_directory(plan.recipe.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self._model_directory))

    def text(self, ids: Sequence[int]) -> str:
        """Decode token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """List the ids of the tokens that end a completion."""
        data = self._plan.recipe.data
        template = resolve_template(data.chat_template, self.tokenizer)
        ends = stop_tokens(self.tokenizer, template, data, self._model_directory)
        return tuple(sorted({*ends, *self._online.sampling.stop_token_ids}))

    def of_round(self, number: int) -> list[tuple[int, ...]]:
        """Return the prompts for which a round samples. Prompts of held-out groups are excluded.

        Raises:
            DataError: there are no prompts, or all are excluded.
        """
        seed, count = self._plan.recipe.seed, self._online.prompts_per_round
        chosen = prompts_of_round(self._keys, self._heldout_keys, seed, number, count)
        return [self._fitting[i].ids for i in chosen]

    @cached_property
    def _keys(self) -> list[bytes]:
        return [prompt.key for prompt in self._fitting]

    @cached_property
    def _heldout_keys(self) -> set[bytes]:
        return heldout_keys(self._prepared)

    @cached_property
    def answers(self) -> dict[tuple[int, ...], str | None]:
        """Return the reference answer of each prompt by its token ids; None for a prompt without an answer."""
        return {p.ids: p.answer for p in self._fitting}

    @cached_property
    def _fitting(self) -> list[Prompt]:
        """List the prompts that leave enough of the model's context for `max_new_tokens` more tokens."""
        every = training_prompts(self._prepared) if self._source is None else read_prompts(self._source)
        fitting = [p for p in every if self._longest is None or len(p.ids) <= self._longest]
        if len(fitting) < len(every):
            left = len(every) - len(fitting)
            self._say(
                f"{left:,} of {len(every):,} prompts are left out: they are too long to leave room in the model's "
                "context for online.sampling.max_new_tokens tokens"
            )
        return fitting

    @cached_property
    def _longest(self) -> int | None:
        context = context_tokens(self._model_directory)
        return None if context is None else context - self._online.sampling.max_new_tokens

    @cached_property
    def heldout(self) -> list[list[int]]:
        """List the held-out prompts on which policies are measured.

        Raises:
            ConfigError: no held-out prompt leaves enough of the model's context for a completion.
        """
        prompts = heldout_prompts(self._prepared, self._online.evaluate.prompts, self._longest)
        if not prompts:
            raise ConfigError(
                "every held-out prompt is too long: the model's context must also hold a completion",
                where=f"online.sampling.max_new_tokens={self._online.sampling.max_new_tokens}",
                fix=f"lower max_new_tokens: with the present value, a prompt may have at most {self._longest} tokens",
            )
        return prompts

    @cached_property
    def heldout_texts(self) -> list[str]:
        return [self.text(ids) for ids in self.heldout]
