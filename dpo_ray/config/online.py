"""Rounds of online preference optimisation: sample, judge, pair, train, evaluate, promote."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .base import StrictModel, field_error
from .judge import Judge, SingleJudge, cpus_of, members_of
from .roles import RoleConfig
from .sources import Sources


class SamplingConfig(StrictModel):
    """How completions are sampled from the policy."""

    samples_per_prompt: int = Field(default=4, ge=2)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    max_new_tokens: int = Field(default=256, gt=0)
    stop_token_ids: tuple[int, ...] = ()
    """Besides the end-of-turn tokens that the model and the data have."""

    prompts_per_granule: int = Field(default=64, gt=0)
    """Prompts that are sampled, and kept, together: what a lost engine costs."""

    pair_truncated: bool = False
    """Whether completions that the limit cut off may be paired."""


class RoundPairingConfig(StrictModel):
    """Which pairs are made of a prompt's judged completions."""

    pairs: Literal["best_worst", "best_random", "top_bottom", "margin", "list"] = "best_worst"
    """top_bottom: each of the best `k` with each of the worst `k`. margin: every two that are `min_margin` apart. list: the whole
    ranked list as one group, for objectives that learn from lists."""

    k: int = Field(default=2, gt=0)
    """Of top_bottom."""

    min_margin: float = Field(default=0.0, ge=0)
    """Pairs whose scores are not further apart are dropped; 0: ties alone."""

    min_agreement: float = Field(default=0.0, ge=0, le=1)
    """Prompts on which the judges agree less are dropped."""

    length_penalty: float = Field(default=0.0, ge=0)
    """Taken from a completion's score for each token: among completions of like quality the shorter one then wins."""

    max_length_ratio: float | None = Field(default=None, gt=1)
    """Pairs of which one completion is more than so many times as long as the other are dropped."""

    labels: Literal["hard", "bradley_terry"] = "hard"
    """bradley_terry: the scores are log-odds, as reward models learn them, and a pair's label is the probability
    sigmoid(better - worse) that they give; of best_worst and best_random."""

    min_pairs: int = Field(default=1, gt=0)
    """Fewer pairs stop the round, with the reasons."""

    @model_validator(mode="after")
    def _labels_are_of_one_pair(self) -> RoundPairingConfig:
        if self.labels == "bradley_terry" and self.pairs not in ("best_worst", "best_random"):
            raise field_error("labels", f"pairs={self.pairs} makes several of a prompt: say hard, or pairs=best_worst")
        return self


class MixConfig(StrictModel):
    """What a round learns from besides its own pairs, as shares of all its groups."""

    offline: float = Field(default=0.0, ge=0, lt=1)
    """Of the preference data (data.train), a fresh seeded choice each round."""

    earlier_rounds: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_room(self) -> MixConfig:
        if self.offline + self.earlier_rounds >= 1:
            raise field_error("offline", "with earlier_rounds it takes all: leave a share for the round's own pairs")
        return self


class RoundEvaluationConfig(StrictModel):
    """How each round's policy is measured, on prompts that no round trains on."""

    prompts: int = Field(default=128, gt=0)
    """Held-out prompts (data.eval): one completion each of the policy, the previous one and the initial one."""

    judge: Judge | None = None
    """Who compares; None: the judge of the rounds."""

    bootstrap_samples: int = Field(default=2000, gt=0)
    confidence: float = Field(default=0.95, gt=0, lt=1)


class PromotionConfig(StrictModel):
    """What a round's policy must show to become the policy; all that are set must hold. None set: it always does."""

    min_win_rate_against_previous: float | None = Field(default=None, ge=0, le=1)
    min_win_rate_against_initial: float | None = Field(default=None, ge=0, le=1)
    min_true_reward_gain: float | None = None
    """Over the previous policy, where the true reward is known."""

    max_kl: float | None = Field(default=None, gt=0)
    """Nats a completion, to the initial policy."""

    min_heldout_accuracy: float | None = Field(default=None, ge=0, le=1)
    max_length_growth: float | None = Field(default=None, gt=1)
    """Mean tokens of a completion, over the initial policy's."""


class StopConfig(StrictModel):
    """When the rounds end before all are run."""

    kl_budget: float | None = Field(default=None, gt=0)
    """Nats a completion, to the initial policy: the first promoted round that reaches it is the last."""

    rounds_without_gain: int | None = Field(default=None, gt=0)
    """So many rounds in a row that were rejected, or whose win rate against the previous policy is not above one half."""

    target_win_rate: float | None = Field(default=None, gt=0, le=1)
    """Against the initial policy."""


class OnlineConfig(StrictModel):
    """Iterative online DPO. With this section `dpo-ray run` runs rounds instead of one offline training."""

    rounds: int = Field(default=3, gt=0)
    """Raise it, and a finished run goes on."""

    prompts: Sources | None = None
    """Where prompts come from: rows of the formats of data.train, of which the prompt alone is used (and `answer`, for the
    verifier). None: the prompts of data.train."""

    prompts_per_round: int = Field(default=512, gt=0)
    """A fresh seeded subset each round; all prompts are seen before any comes again."""

    sampling: SamplingConfig = SamplingConfig()
    judge: Judge
    pairing: RoundPairingConfig = RoundPairingConfig()
    mix: MixConfig = MixConfig()
    reference: Literal["initial", "previous", "ema"] = "initial"
    """The reference of a round: the model of the recipe, the policy that the round starts from, or the running mean of these."""

    ema_decay: float = Field(default=0.9, gt=0, lt=1)
    """Of reference=ema: the mean is decay * mean + (1 - decay) * policy, after each promotion."""

    optimizer: Literal["restart", "carry"] = "restart"
    """carry: a round's optimizer begins with the last one's moments."""

    evaluate: RoundEvaluationConfig = RoundEvaluationConfig()
    promote_if: PromotionConfig = PromotionConfig()
    stop_if: StopConfig = StopConfig()

    def judges(self) -> list[SingleJudge]:
        """List all single judges, also those of ensembles and of the evaluation."""
        return [one for judge in self.named_judges() for one in members_of(judge)]

    def judge_environment(self) -> set[str]:
        """Return the environment variables that the judges need, such as those with API keys."""
        return set().union(*(judge.environment() for judge in self.judges()))

    def judges_cpus(self, role: RoleConfig) -> float:
        """Count the CPUs that all judges hold while rounds run."""
        return sum(cpus_of(judge, role) for judge in self.named_judges())

    def named_judges(self) -> list[Judge]:
        """List the judge of the rounds, and that of the evaluation where it is another."""
        other = self.evaluate.judge
        return [self.judge, *([other] if other not in (None, self.judge) else [])]
