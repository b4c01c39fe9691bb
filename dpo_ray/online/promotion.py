"""The decisions after a round: whether its policy is promoted (the next round starts from it), and whether to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_ray.config.online import PromotionConfig, StopConfig

EVEN = 0.5  # the win rate of two equally good policies


@dataclass(frozen=True)
class RoundFigures:
    """The measured metrics of a round's policy. A metric that was not measured is None."""

    win_rate_against_previous: float | None = None
    win_rate_against_initial: float | None = None
    true_reward: float | None = None
    true_reward_gain: float | None = None  # over the previous policy
    kl: float | None = None  # to the initial policy, in nats per completion
    heldout_accuracy: float | None = None
    mean_tokens: float | None = None  # per completion
    initial_mean_tokens: float | None = None  # per completion of the initial policy
    distinct_2: float | None = None
    entropy: float | None = None  # nats, of the completions' tokens

    @property
    def length_growth(self) -> float | None:
        """Return the mean length of this policy's completions divided by that of the initial policy's completions."""
        if self.mean_tokens is None or not self.initial_mean_tokens:
            return None
        return self.mean_tokens / self.initial_mean_tokens


@dataclass(frozen=True)
class Decision:
    """The decision whether a round's policy is promoted, with the reasons."""

    promoted: bool
    reasons: tuple[str, ...]  # a sentence for each rule of the recipe; broken rules come first


@dataclass(frozen=True)
class DecidedRound:
    """A finished round: the metrics of its policy, and whether this policy was promoted (otherwise it was rejected)."""

    figures: RoundFigures
    promoted: bool


def decide(figures: RoundFigures, rules: PromotionConfig) -> Decision:
    """Decide whether a round's policy is promoted: all rules of the recipe's `online.promote_if` must hold.

    If the metric of a rule was not measured, the rule does not hold.
    """
    f = figures
    least = {
        "min_win_rate_against_previous": ("the win rate against the previous policy", f.win_rate_against_previous),
        "min_win_rate_against_initial": ("the win rate against the initial policy", f.win_rate_against_initial),
        "min_true_reward_gain": ("the gain in true reward over the previous policy", f.true_reward_gain),
        "min_heldout_accuracy": ("the held-out accuracy", f.heldout_accuracy),
    }
    most = {
        "max_kl": ("the KL to the initial policy", f.kl),
        "max_length_growth": ("the growth in length over the initial policy", f.length_growth),
    }
    held, broken = [], []
    for rule, (name, value) in {**least, **most}.items():
        limit: float | None = getattr(rules, rule)
        if limit is None:
            continue
        if value is None:
            broken.append(f"{name} is not measured, and promote_if.{rule} needs it")
        elif value >= limit if rule in least else value <= limit:
            held.append(f"{name} is {value:.6g}, {'at least' if rule in least else 'at most'} {limit:g}")
        else:
            side = "not at least" if rule in least else "not at most"
            broken.append(f"{name} is {value:.6g}, {side} promote_if.{rule}={limit:g}")
    return Decision(not broken, (*broken, *held) or ("promote_if sets no rule",))


def stop_reason(history: Sequence[DecidedRound], rules: StopConfig) -> str | None:
    """Return the reason why the rounds stop, according to the recipe's `online.stop_if`; None if they continue.

    A metric that was not measured reaches no limit. A round without a measured win rate against the previous policy
    counts as a round without a gain.

    Args:
        history: all decided rounds, beginning with the first one.
    """
    last_promoted = max((n for n, r in enumerate(history, 1) if r.promoted), default=None)
    if last_promoted is not None:
        figures = history[last_promoted - 1].figures
        for name, value, rule in (
            ("a KL to the initial policy", figures.kl, "kl_budget"),
            ("a win rate against the initial policy", figures.win_rate_against_initial, "target_win_rate"),
        ):
            limit: float | None = getattr(rules, rule)
            if limit is not None and value is not None and value >= limit:
                return f"round {last_promoted} has {name} of {value:.6g}, and stop_if.{rule} is {limit:g}"
    patience = rules.rounds_without_gain
    if patience is not None and len(history) >= patience and not any(map(_gained, history[-patience:])):
        return f"the last {patience} rounds brought no gain, and stop_if.rounds_without_gain is {patience}"
    return None


def _gained(decided: DecidedRound) -> bool:
    rate = decided.figures.win_rate_against_previous
    return decided.promoted and rate is not None and rate > EVEN
