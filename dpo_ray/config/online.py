"""The section `online`: rounds of sampling, judging, pairing, training, evaluating and promoting."""

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
    """Further stop tokens, in addition to the end-of-turn tokens of the model and the data."""

    prompts_per_granule: int = Field(default=64, gt=0, le=10_000_000)
    """Prompts that are sampled and committed together: the work that is lost with an engine."""

    pair_truncated: bool = False
    """Also use completions that were cut off at the limit in pairs."""


class RoundPairingConfig(StrictModel):
    """How pairs are made of the judged completions of a prompt."""

    pairs: Literal["best_worst", "best_random", "top_bottom", "margin", "list"] = "best_worst"
    """top_bottom: each of the best `k` with each of the worst `k`. margin: every two whose scores differ by
    `min_margin`. list: the whole ranked list as one group, for objectives that learn from lists."""

    k: int = Field(default=2, gt=0, le=10_000)
    """Only for top_bottom."""

    min_margin: float = Field(default=0.0, ge=0)
    """Pairs whose scores differ by this or less are dropped; 0: only ties are dropped."""

    min_agreement: float = Field(default=0.0, ge=0, le=1)
    """Prompts on which the agreement of the judges is lower than this are dropped."""

    length_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from a completion's score for each token, so that of two equally good completions the shorter one
    wins."""

    max_length_ratio: float | None = Field(default=None, gt=1)
    """Pairs are dropped if one completion is more than this many times as long as the other."""

    labels: Literal["hard", "bradley_terry"] = "hard"
    """bradley_terry: the scores are log-odds, as reward models learn them, and the label of a pair is the probability
    sigmoid(better - worse) that follows from them; only for best_worst and best_random."""

    min_pairs: int = Field(default=1, gt=0)
    """If there are fewer pairs, the round stops and reports the reasons."""

    @model_validator(mode="after")
    def _labels_are_of_one_pair(self) -> RoundPairingConfig:
        if self.labels == "bradley_terry" and self.pairs not in ("best_worst", "best_random"):
            raise field_error(
                "labels", f"pairs={self.pairs} makes several pairs of a prompt: set labels=hard, or pairs=best_worst"
            )
        return self


class MixConfig(StrictModel):
    """What a round trains on in addition to its own pairs, as shares of all its groups."""

    offline: float = Field(default=0.0, ge=0, lt=1)
    """Share of preference data (data.train), a new seeded selection in each round."""

    earlier_rounds: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_room(self) -> MixConfig:
        if self.offline + self.earlier_rounds >= 1:
            raise field_error(
                "offline", "together with earlier_rounds it is 1 or more: leave a share for the round's own pairs"
            )
        return self


class RoundEvaluationConfig(StrictModel):
    """How the policy of each round is evaluated, on prompts that no round trains on."""

    prompts: int = Field(default=128, gt=0, le=MOST_ROWS)
    """Held-out prompts (data.eval): the policy, the previous and the initial policy each sample one completion per
    prompt."""

    judge: Judge | None = None
    """The judge that compares; null: the judge of the rounds."""

    bootstrap_samples: int = Field(default=2000, gt=0, le=1_000_000)
    confidence: float = Field(default=0.95, gt=0, lt=1)


class PromotionConfig(StrictModel):
    """The conditions under which a round's policy is promoted; all that are set must hold. If none is set, it always
    is."""

    min_win_rate_against_previous: float | None = Field(default=None, ge=0, le=1)
    min_win_rate_against_initial: float | None = Field(default=None, ge=0, le=1)
    min_true_reward_gain: float | None = None
    """Gain over the previous policy, if the true reward is known."""

    max_kl: float | None = Field(default=None, gt=0)
    """KL divergence from the initial policy, in nats per completion."""

    min_heldout_accuracy: float | None = Field(default=None, ge=0, le=1)
    max_length_growth: float | None = Field(default=None, gt=1)
    """Mean tokens of a completion, divided by those of the initial policy."""


class StopConfig(StrictModel):
    """When the rounds end early."""

    kl_budget: float | None = Field(default=None, gt=0)
    """KL divergence from the initial policy, in nats per completion: the first promoted round that reaches it is the
    last."""

    rounds_without_gain: int | None = Field(default=None, gt=0)
    """End after this many rounds in a row that were rejected, or whose win rate against the previous policy is not
    above 1/2."""

    target_win_rate: float | None = Field(default=None, gt=0, le=1)
    """End when the win rate against the initial policy reaches this."""


class OnlineConfig(StrictModel):
    """Iterative online DPO. With this section, `dpo-ray run` runs rounds instead of one offline training."""

    rounds: int = Field(default=3, gt=0, le=1_000_000)
    """Number of rounds. A finished run goes on if it is increased."""

    prompts: Sources | None = None
    """The source of prompts: rows in the formats of data.train, of which only the prompt is used (and `answer`, for the
    verifier). null: the prompts of data.train."""

    prompts_per_round: int = Field(default=512, gt=0, le=MOST_ROWS)
    """A new seeded subset in each round; all prompts are used before any is repeated."""

    sampling: SamplingConfig = SamplingConfig()
    judge: Judge
    pairing: RoundPairingConfig = RoundPairingConfig()
    mix: MixConfig = MixConfig()
    reference: Literal["initial", "previous", "ema"] = "initial"
    """The reference of a round: the model of the recipe, the policy that the round starts from, or the running mean of
    these policies."""

    ema_decay: float = Field(default=0.9, gt=0, lt=1)
    """For reference=ema: after each promotion the mean is decay * mean + (1 - decay) * policy."""

    optimizer: Literal["restart", "carry"] = "restart"
    """carry: the optimizer of a round starts with the moments of the previous round."""

    evaluate: RoundEvaluationConfig = RoundEvaluationConfig()
    promote_if: PromotionConfig = PromotionConfig()
    stop_if: StopConfig = StopConfig()

    def judges(self) -> list[SingleJudge]:
        """List all single judges, including those of ensembles and of the evaluation."""
        return [member for judge in self.named_judges().values() for member in members_of(judge)]

    def judge_environment(self) -> set[str]:
        """Return the environment variables that the judges need, such as those with API keys."""
        return set().union(*(judge.environment() for judge in self.judges()))

    def judges_cpus(self, role: JudgeRole) -> float:
        """Return the CPUs that all judges hold while rounds run."""
        return sum(cpus_of(judge, role) for judge in self.named_judges().values())

    def named_judges(self) -> dict[str, Judge]:
        """Return the judge of the rounds and, if it is a different one, that of the evaluation, by their fields."""
        other = self.evaluate.judge
        return {"online.judge": self.judge} | ({} if other in (None, self.judge) else {"online.evaluate.judge": other})
