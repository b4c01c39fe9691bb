"""How much there is to compute: groups and their tokens, as far as it is known before the data is prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from dpo_ray.config.objective import kinds_of_groups
from dpo_ray.config.recipe import Recipe
from dpo_ray.config.sources import HubSource, SyntheticSource
from dpo_ray.schedule.order import estimate_work

# Rows of data sets that recipes name on the hub, by the `dataset_info` of their cards.
ROWS = {
    "HuggingFaceH4/ultrafeedback_binarized": 61_135,  # train_prefs
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": 271_409,
    "allenai/llama-3.1-tulu-3-70b-preference-mixture": 334_367,
}
ASSUMED_ROWS = 60_000  # of any other data set: about UltraFeedback's
ASSUMED_PROMPT, ASSUMED_COMPLETION = 1 / 4, 1 / 4  # of data.max_length_tokens, on average


@dataclass(frozen=True)
class Workload:
    """Preference groups of one epoch and their mean lengths; `source` says how they are known."""

    groups: int
    completions: float  # of a group
    prompt_tokens: float
    completion_tokens: float
    longest_group_tokens: int  # the most that a group can have
    source: str

    @property
    def group_tokens(self) -> float:
        """Tokens of a mean group, its prompt once."""
        return self.prompt_tokens + self.completions * self.completion_tokens

    @property
    def sequence_tokens(self) -> float:
        return self.prompt_tokens + self.completion_tokens

    @property
    def prompt_share(self) -> float:
        return self.prompt_tokens / self.group_tokens


def measured_workload(recipe: Recipe, statistics: Mapping[str, Mapping[str, Any]]) -> Workload:
    """Read a workload from the statistics that `prepare` made of the training split, by source."""
    parts = [s for s in statistics.values() if s["groups"]]
    groups, completions = sum(s["groups"] for s in parts), sum(s["completions"] for s in parts)
    prompt = sum(s["prompt"]["sum"] for s in parts) / groups
    completion = sum(s["completion"]["sum"] for s in parts) / completions
    longest = max(s["prompt"]["max"] + ceil(s["completions"] / s["groups"]) * s["completion"]["max"] for s in parts)
    limit = longest_group_tokens(recipe, completions / groups)
    return Workload(
        groups, completions / groups, prompt, completion, min(longest, limit), "the tokens that `prepare` made"
    )


def assumed_workload(recipe: Recipe) -> Workload:
    """Take what the recipe says of its data, and state the rest."""
    rows, said = 0, []
    for source in recipe.data.train:
        match source:
            case SyntheticSource():
                rows, what = rows + source.pairs, f"{source.pairs:,} synthetic pairs"
            case HubSource() if source.path in ROWS:
                rows, what = rows + ROWS[source.path], f"{ROWS[source.path]:,} rows of {source.path} (its card)"
            case _:
                rows, what = rows + ASSUMED_ROWS, f"an assumed {ASSUMED_ROWS:,} rows of {source.path}"
        said.append(what)
    completions = 1.0 if kinds_of_groups(recipe.train.objective) == {"completions"} else 2.0
    groups = round(rows * 2 / completions)
    longest = recipe.data.max_length_tokens
    what = f"{'; '.join(said)}; an assumed mean of {longest // 4:,} tokens a prompt and a completion (1/4 of max_length_tokens)"
    return Workload(
        groups,
        completions,
        longest * ASSUMED_PROMPT,
        longest * ASSUMED_COMPLETION,
        longest_group_tokens(recipe, completions),
        f"{what}; `dpo-ray inspect data` measures them",
    )


def longest_group_tokens(recipe: Recipe, completions: float) -> int:
    """Return the most tokens of a group: prompt and completion are at most max_length_tokens, the prompt is there once."""
    return ceil(completions) * recipe.data.max_length_tokens


def steps_of(recipe: Recipe, groups: int) -> int:
    """Count the optimizer steps, of all rounds where there are any: a pair of each prompt is taken for what a round trains on."""
    t, online = recipe.train, recipe.online
    if online is not None:
        each = t.steps if t.steps is not None else ceil(online.prompts_per_round * t.epochs / t.groups_per_step)
        return online.rounds * each
    return t.steps if t.steps is not None else ceil(groups * t.epochs / t.groups_per_step)


@dataclass(frozen=True)
class MicroBatches:
    """How a step's groups fall to ranks."""

    tokens: int  # of the largest micro-batch, prompts once
    most_tokens: int  # of a rank in a step that can be
    usual: int  # micro-batches of a rank in a step, where groups are of mean length
    is_single_for_sure: bool


def micro_batches(workload: Workload, groups_per_step: int, ranks: int, budget_tokens: int) -> MicroBatches:
    """Say what `schedule/order.py` makes of a step.

    With k = ceil(groups / ranks), a rank of at most k groups has k of the greatest length L at most. Groups are dealt by their
    work, greatest first, to the rank with the least. A rank that got more than k had, before its last, no more work than one
    that ends with k - 1, so at most (k - 1) W, where W is the work of the longest group; and its last is at most the mean of
    the k or more before it. As a token is a unit of work or more, it has at most (k - 1) (1 + 1/k) W tokens.
    """
    per_rank, longest = ceil(groups_per_step / ranks), workload.longest_group_tokens
    completions = ceil(workload.completions)
    work = estimate_work(0, [ceil(longest / completions)] * completions)
    most_tokens = max(per_rank * longest, ceil((per_rank - 1) * (1 + 1 / per_rank) * work))
    usual_tokens = per_rank * workload.group_tokens
    budget = max(budget_tokens, longest)  # a group is never split
    return MicroBatches(
        tokens=min(budget, most_tokens),
        most_tokens=most_tokens,
        usual=max(1, ceil(usual_tokens / budget)),
        is_single_for_sure=most_tokens <= budget,
    )
