"""The amount of data in a recipe: preference groups and their tokens, measured or assumed, and how ranks share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from dpo_ray.config.objective import kinds_of_groups
from dpo_ray.config.recipe import Recipe
from dpo_ray.config.sources import HubSource, SyntheticSource
from dpo_ray.schedule.order import estimate_work

# The rows of hub data sets that our recipes use, from the `dataset_info` of their cards.
ROWS = {
    "HuggingFaceH4/ultrafeedback_binarized": 61_135,  # train_prefs
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": 271_409,
    "allenai/llama-3.1-tulu-3-70b-preference-mixture": 334_367,
}
ASSUMED_ROWS = 60_000  # for any other data set: about as many as UltraFeedback has
ASSUMED_PROMPT, ASSUMED_COMPLETION = 1 / 4, 1 / 4  # the mean lengths, as shares of data.max_length_tokens


@dataclass(frozen=True)
class Workload:
    """The number of preference groups in one epoch and their mean lengths. `source` says where the numbers come from."""

    groups: int
    completions: float  # per group
    prompt_tokens: float
    completion_tokens: float
    longest_group_tokens: int  # the largest possible number of tokens of a group
    source: str

    @property
    def group_tokens(self) -> float:
        """Return the number of tokens in a preference group of mean size. Its prompt counts once."""
        return self.prompt_tokens + self.completions * self.completion_tokens

    @property
    def sequence_tokens(self) -> float:
        return self.prompt_tokens + self.completion_tokens

    @property
    def prompt_share(self) -> float:
        return self.prompt_tokens / self.group_tokens


def measured_workload(recipe: Recipe, statistics: Mapping[str, Mapping[str, Any]]) -> Workload:
    """Compute the amount of data from the statistics that the stage `prepare` wrote for each source of training data."""
    parts = [s for s in statistics.values() if s["groups"]]
    groups, completions = sum(s["groups"] for s in parts), sum(s["completions"] for s in parts)
    prompt = sum(s["prompt"]["sum"] for s in parts) / groups
    completion = sum(s["completion"]["sum"] for s in parts) / completions
    longest = max(s["prompt"]["max"] + ceil(s["completions"] / s["groups"]) * s["completion"]["max"] for s in parts)
    limit = longest_group_tokens(recipe, completions / groups)
    return Workload(
        groups, completions / groups, prompt, completion, min(longest, limit), "the tokens that `prepare` wrote"
    )


def assumed_workload(recipe: Recipe) -> Workload:
    """Estimate the amount of data from the recipe alone. The result's `source` lists the assumptions."""
    rows, parts = 0, []
    for source in recipe.data.train:
        match source:
            case SyntheticSource():
                rows, what = rows + source.pairs, f"{source.pairs:,} synthetic pairs"
            case HubSource() if source.path in ROWS:
                rows, what = rows + ROWS[source.path], f"{ROWS[source.path]:,} rows of {source.path} (its card)"
            case _:
                rows, what = rows + ASSUMED_ROWS, f"an assumed {ASSUMED_ROWS:,} rows of {source.path}"
        parts.append(what)
    completions = 1.0 if kinds_of_groups(recipe.train.objective) == {"completions"} else 2.0
    groups = round(rows * 2 / completions)
    longest = recipe.data.max_length_tokens
    what = f"{'; '.join(parts)}; an assumed mean of {longest // 4:,} tokens per prompt and per completion (1/4 of max_length_tokens)"
    return Workload(
        groups,
        completions,
        longest * ASSUMED_PROMPT,
        longest * ASSUMED_COMPLETION,
        longest_group_tokens(recipe, completions),
        f"{what}; `dpo-ray inspect data` measures them",
    )


def longest_group_tokens(recipe: Recipe, completions: float) -> int:
    """Return the largest possible number of tokens in a preference group with this number of completions.

    A completion and its prompt have at most `max_length_tokens` together, and the prompt counts only once.
    """
    return ceil(completions) * recipe.data.max_length_tokens


def steps_of(recipe: Recipe, groups: int) -> int:
    """Count the optimizer steps of a run. For an online run, count all rounds, and assume one pair for each prompt."""
    t, online = recipe.train, recipe.online
    if online is not None:
        each = t.steps if t.steps is not None else ceil(online.prompts_per_round * t.epochs / t.groups_per_step)
        return online.rounds * each
    return t.steps if t.steps is not None else ceil(groups * t.epochs / t.groups_per_step)


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches that a rank gets in one step: their number and their tokens."""

    tokens: int  # of the largest micro-batch, with prompts once
    most_tokens: int  # the upper limit of a rank's tokens in a step
    usual: int  # micro-batches of a rank in a step, if groups have mean length
    is_single_for_sure: bool


def micro_batches(workload: Workload, groups_per_step: int, ranks: int, budget_tokens: int) -> MicroBatches:
    """Compute the micro-batches of a rank in one step, as `schedule/order.py` distributes the step's groups.

    The order of work is greatest first, and each group goes to the rank with the least work so far. This gives an upper
    limit for the tokens of a rank. Let k = ceil(groups / ranks), L the length and W the work of the longest group.

    - A rank with at most k groups has at most k L tokens.
    - A rank with more than k groups had, before its last group, no more work than some rank that ends with at most
      k - 1 groups. So its work was then at most (k - 1) W. The rank's last group has at most the mean work of the k or
      more groups before it. Because a token is at least one unit of work, the rank has at most (k - 1) (1 + 1/k) W
      tokens.
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
