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
    """Number of prompts in one unit of work (granule) of an engine. The completions of a granule are committed
    together. If an engine dies, only its unfinished granules are lost."""

    pair_truncated: bool = False
    """Also make pairs with completions that were cut off at max_new_tokens."""


class RoundPairingConfig(StrictModel):
    """How pairs are made from the judged completions of a prompt."""

    pairs: Literal["best_worst", "best_random", "top_bottom", "margin", "list"] = "best_worst"
    """best_worst: the best and the worst completion. best_random: the best and a random worse one. top_bottom: each of
    the best `k` with each of the worst `k`. margin: every two completions whose scores differ by more than
    `min_margin`. list: no pairs, but all completions as one ranked list, for objectives that learn from lists."""

    k: int = Field(default=2, gt=0, le=10_000)
    """Only for pairs=top_bottom: how many of the best and of the worst completions are paired."""

    min_margin: float = Field(default=0.0, ge=0)
    """A pair is dropped if its two scores differ by this value or less. With 0, only ties are dropped."""

    min_agreement: float = Field(default=0.0, ge=0, le=1)
    """A prompt is dropped if the agreement of the judges about the prompt's completions is below this value. 1 is full
    agreement."""

    length_penalty: float = Field(default=0.0, ge=0)
    """This value, times the number of tokens of a completion, is subtracted from the completion's score. So the shorter
    of two equally good completions wins."""

    max_length_ratio: float | None = Field(default=None, gt=1)
    """A pair is dropped if one completion is more than this many times as long as the other."""

    labels: Literal["hard", "bradley_terry"] = "hard"
    """The probability that the better completion of a pair is preferred. hard: 1. bradley_terry: sigmoid(better score -
    worse score). Use it only if scores are log-odds, as those of most reward models are, and only with pairs=best_worst
    or best_random."""

    min_pairs: int = Field(default=1, gt=0)
    """If a round makes fewer pairs than this, the run stops and reports why pairs were dropped."""

    @model_validator(mode="after")
    def _labels_are_of_one_pair(self) -> RoundPairingConfig:
        if self.labels == "bradley_terry" and self.pairs not in ("best_worst", "best_random"):
            raise field_error(
                "labels",
                f"bradley_terry needs one pair per prompt, but pairs={self.pairs} makes several: set labels=hard, or "
                "pairs=best_worst",
            )
        return self


class MixConfig(StrictModel):
    """Data that a round trains on besides its new pairs, as shares of all preference groups of the training."""

    offline: float = Field(default=0.0, ge=0, lt=1)
    """Share of preference groups from data.train. Each round selects other groups at random, with the recipe's seed."""

    earlier_rounds: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_room(self) -> MixConfig:
        if self.offline + self.earlier_rounds >= 1:
            raise field_error(
                "offline",
                "offline + earlier_rounds is 1 or more, so no share is left for the new pairs: lower one of the two",
            )
        return self


class RoundEvaluationConfig(StrictModel):
    """How the policy of each round is evaluated, on held-out prompts that no round trains on."""

    prompts: int = Field(default=128, gt=0, le=MOST_ROWS)
    """Number of held-out prompts (data.eval). For each prompt, the new, the previous and the initial policy sample one
    completion."""

    judge: Judge | None = None
    """The judge that scores these completions. null: the judge of the rounds (`online.judge`)."""

    bootstrap_samples: int = Field(default=2000, gt=0, le=1_000_000)
    confidence: float = Field(default=0.95, gt=0, lt=1)


class PromotionConfig(StrictModel):
    """The conditions for promoting a round's policy. The next round starts from the policy that was promoted last.

    All conditions that are set must hold. If none is set, every policy is promoted.
    """

    min_win_rate_against_previous: float | None = Field(default=None, ge=0, le=1)
    min_win_rate_against_initial: float | None = Field(default=None, ge=0, le=1)
    min_true_reward_gain: float | None = None
    """Smallest gain in true reward over the previous policy. Only for data whose true reward can be computed
    (`synthetic`)."""

    max_kl: float | None = Field(default=None, gt=0)
    """Largest KL divergence from the initial policy, in nats per completion."""

    min_heldout_accuracy: float | None = Field(default=None, ge=0, le=1)
    max_length_growth: float | None = Field(default=None, gt=1)
    """Largest ratio of two mean completion lengths, in tokens: that of the new policy divided by that of the initial
    policy."""


class StopConfig(StrictModel):
    """The conditions under which the rounds end early."""

    kl_budget: float | None = Field(default=None, gt=0)
    """End after the first promoted round whose policy reaches this KL divergence from the initial policy, in nats per
    completion."""

    rounds_without_gain: int | None = Field(default=None, gt=0)
    """End after this many rounds in a row without gain. A round is without gain if its policy is not promoted, or has a
    win rate of at most 1/2 against the previous policy."""

    target_win_rate: float | None = Field(default=None, gt=0, le=1)
    """End when the win rate against the initial policy reaches this value."""


class OnlineConfig(StrictModel):
    """Iterative online DPO. With this section, `dpo-ray run` runs rounds instead of one offline training."""

    rounds: int = Field(default=3, gt=0, le=1_000_000)
    """Number of rounds. If you increase it, a finished run continues with further rounds."""

    prompts: Sources | None = None
    """The source of prompts, in the formats of data.train. Only the prompt of each row is used; a verifier also uses
    `answer`. null: the prompts of data.train."""

    prompts_per_round: int = Field(default=512, gt=0, le=MOST_ROWS)
    """Number of prompts in a round. Each round selects other prompts at random, with the recipe's seed. A prompt is
    used again only after all prompts have been used."""

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
    """restart: each round starts with a new optimizer. carry: each round continues with the moments (running averages
    of gradients) of the previous round."""

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
        """Return the different judges, by their fields in the recipe: `online.judge` and `online.evaluate.judge`."""
        other = self.evaluate.judge
        return {"online.judge": self.judge} | ({} if other in (None, self.judge) else {"online.evaluate.judge": other})
