"""The recipe section `online`: rounds of sampling, judging, pairing, training, evaluating and promoting."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import MOST_ROWS, MOST_TOKENS, StrictModel, field_error
from .judge import Judge, SingleJudge, cpus_of, members_of
from .roles import JudgeRole
from .sources import Sources


class SamplingConfig(StrictModel):
    """How completions are sampled from the policy."""

    samples_per_prompt: int = Field(default=4, ge=2, le=10_000)
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    max_new_tokens: int = Field(default=256, gt=0, le=MOST_TOKENS)
    stop_token_ids: tuple[Annotated[int, Field(ge=0, le=MOST_TOKENS)], ...] = ()
    """Tokens that end a completion, in addition to the end-of-turn tokens of the model and the data."""

    prompts_per_granule: int = Field(default=64, gt=0, le=10_000_000)
    """Prompts of one unit of work (granule), whose completions are committed together. An engine that dies loses only
    its unfinished units."""

    pair_truncated: bool = False
    """Also make pairs with completions that were cut off at max_new_tokens."""


class RoundPairingConfig(StrictModel):
    """How pairs are made from the judged completions of a prompt."""

    pairs: Literal["best_worst", "best_random", "top_bottom", "margin", "list"] = "best_worst"
    """best_worst: the best and the worst completion. best_random: the best and a random worse one. top_bottom: each of
    the best `k` with each of the worst `k`. margin: every two completions whose scores differ by more than
    `min_margin`. list: the whole ranked list as one group, for objectives that learn from lists."""

    k: int = Field(default=2, gt=0, le=10_000)
    """Only for pairs=top_bottom: how many of the best and of the worst completions are paired."""

    min_margin: float = Field(default=0.0, ge=0)
    """A pair is dropped if its two scores differ by this value or less. With 0, only ties are dropped."""

    min_agreement: float = Field(default=0.0, ge=0, le=1)
    """A prompt is dropped if the judges agree less than this about its completions. 1 is full agreement."""

    length_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from a completion's score for each of its tokens. So the shorter of two equally good completions wins."""

    max_length_ratio: float | None = Field(default=None, gt=1)
    """A pair is dropped if one completion is more than this many times as long as the other."""

    labels: Literal["hard", "bradley_terry"] = "hard"
    """The probability that the better completion of a pair is preferred. hard: 1. bradley_terry: sigmoid(better score -
    worse score), for scores that are log-odds, as reward models learn them; only for best_worst and best_random."""

    min_pairs: int = Field(default=1, gt=0)
    """A round that makes fewer pairs than this stops and reports the reasons."""

    @model_validator(mode="after")
    def _labels_are_of_one_pair(self) -> RoundPairingConfig:
        if self.labels == "bradley_terry" and self.pairs not in ("best_worst", "best_random"):
            raise field_error(
                "labels", f"pairs={self.pairs} makes several pairs for a prompt: set labels=hard, or pairs=best_worst"
            )
        return self


class MixConfig(StrictModel):
    """What a round trains on besides its own pairs, as shares of all preference groups of its training."""

    offline: float = Field(default=0.0, ge=0, lt=1)
    """Share of preference data from data.train. Each round selects new data at random, from the recipe's seed."""

    earlier_rounds: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_room(self) -> MixConfig:
        if self.offline + self.earlier_rounds >= 1:
            raise field_error(
                "offline", "together with earlier_rounds it is 1 or more: leave a share for the round's own pairs"
            )
        return self


class RoundEvaluationConfig(StrictModel):
    """How the policy of each round is evaluated, on held-out prompts that no round trains on."""

    prompts: int = Field(default=128, gt=0, le=MOST_ROWS)
    """Number of held-out prompts (data.eval). For each prompt, the new, the previous and the initial policy sample one
    completion."""

    judge: Judge | None = None
    """The judge that compares these completions; null: the judge of the rounds."""

    bootstrap_samples: int = Field(default=2000, gt=0, le=1_000_000)
    confidence: float = Field(default=0.95, gt=0, lt=1)


class PromotionConfig(StrictModel):
    """The conditions for promoting a round's policy, which means that the next round starts from it.

    All conditions that are set must hold. If none is set, every policy is promoted.
    """

    min_win_rate_against_previous: float | None = Field(default=None, ge=0, le=1)
    min_win_rate_against_initial: float | None = Field(default=None, ge=0, le=1)
    min_true_reward_gain: float | None = None
    """Smallest gain in true reward over the previous policy; only for data whose true reward is known."""

    max_kl: float | None = Field(default=None, gt=0)
    """Largest KL divergence from the initial policy, in nats per completion."""

    min_heldout_accuracy: float | None = Field(default=None, ge=0, le=1)
    max_length_growth: float | None = Field(default=None, gt=1)
    """Largest mean length of completions, in tokens, divided by the mean length for the initial policy."""


class StopConfig(StrictModel):
    """The conditions under which the rounds end early."""

    kl_budget: float | None = Field(default=None, gt=0)
    """End after the first promoted round whose policy reaches this KL divergence from the initial policy, in nats per
    completion."""

    rounds_without_gain: int | None = Field(default=None, gt=0)
    """End after this many rounds in a row without gain: the round was rejected, or its win rate against the previous
    policy is at most 1/2."""

    target_win_rate: float | None = Field(default=None, gt=0, le=1)
    """End when the win rate against the initial policy reaches this."""


class OnlineConfig(StrictModel):
    """Iterative online DPO. With this section, `dpo-ray run` runs rounds instead of one offline training."""

    rounds: int = Field(default=3, gt=0, le=1_000_000)
    """Number of rounds. If you increase it, a finished run continues with further rounds."""

    prompts: Sources | None = None
    """The source of prompts, in the formats of data.train. Of each row only the prompt is used, and `answer` by a
    verifier. null: the prompts of data.train."""

    prompts_per_round: int = Field(default=512, gt=0, le=MOST_ROWS)
    """Number of prompts in a round. Each round selects new ones at random, from the recipe's seed; a prompt is repeated
    only after all prompts have been used."""

    sampling: SamplingConfig = SamplingConfig()
    judge: Judge
    pairing: RoundPairingConfig = RoundPairingConfig()
    mix: MixConfig = MixConfig()
    reference: Literal["initial", "previous", "ema"] = "initial"
    """The reference model of a round. initial: the recipe's model. previous: the policy that the round starts from. ema:
    a running mean of the promoted policies."""

    ema_decay: float = Field(default=0.9, gt=0, lt=1)
    """Only for reference=ema: after each promotion the mean becomes decay * mean + (1 - decay) * policy."""

    optimizer: Literal["restart", "carry"] = "restart"
    """restart: the optimizer of each round starts anew. carry: it starts with the moments (running averages of gradients)
    of the previous round."""

    evaluate: RoundEvaluationConfig = RoundEvaluationConfig()
    promote_if: PromotionConfig = PromotionConfig()
    stop_if: StopConfig = StopConfig()

    def judges(self) -> list[SingleJudge]:
        """List all single judges of the rounds and of the evaluation; an ensemble counts as its members."""
        return [member for judge in self.named_judges().values() for member in members_of(judge)]

    def judge_environment(self) -> set[str]:
        """Return the names of the environment variables that the judges need, such as for API keys."""
        return set().union(*(judge.environment() for judge in self.judges()))

    def judges_cpus(self, role: JudgeRole) -> float:
        """Return how many CPUs all judges request together while rounds run."""
        return sum(cpus_of(judge, role) for judge in self.named_judges().values())

    def named_judges(self) -> dict[str, Judge]:
        """Return the judge of the rounds and, if it is a different one, that of the evaluation, by their fields."""
        other = self.evaluate.judge
        return {"online.judge": self.judge} | ({} if other in (None, self.judge) else {"online.evaluate.judge": other})
