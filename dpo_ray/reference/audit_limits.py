"""Judge what the audit measured: each statistic against its limit, and in words what a drift of its kind usually means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo_ray.config.reference import AuditConfig
from dpo_ray.errors import AuditError

# Nats; keyed by the fields of reference.audit. Measured between vLLM and a plain forward pass: in float32 3e-6 on average
# and 2e-5 at most; in bfloat16, whose rounding alone moves a log-prob by 0.03, 0.03 on average and 0.2 at most. A bias
# rewards length: 2e-3 a token over 500 tokens is 0.1 of the reward at beta 0.1. A margin error of 0.1 in the loss's own unit moves
# a pair's gradient weight from 0.5 to 0.525, and does so in every epoch.
DEFAULT_LIMITS = {
    "float32": {"max_token_drift": 1e-4, "max_mean_drift": 1e-5, "max_bias": 5e-6, "max_margin_error": 1e-3},
    "bfloat16": {"max_token_drift": 0.5, "max_mean_drift": 0.05, "max_bias": 2e-3, "max_margin_error": 0.1},
}
STANDARD_ERRORS = 3  # by how many of them chance explains a bias or a spread
FEWEST_GROUPS = 16  # for an estimate: of fewer, the standard error itself is a guess
SHOWN_CORRELATION = 0.5  # a message mentions one as strong

Verdict = Literal["within", "over", "too few", "not judged"]


@dataclass(frozen=True)
class Finding:
    """One statistic, what the recipe allows, and what the sample says of it."""

    name: str
    value: float
    limit: float | None  # None: shown, not judged
    field: str | None  # of reference.audit, that sets the limit
    verdict: Verdict
    meaning: str


@dataclass(frozen=True)
class Judgement:
    """The findings on one measurement. It passes if tokens were compared and nothing is over its limit."""

    measured: Mapping[str, Any]
    findings: tuple[Finding, ...]

    @property
    def over(self) -> tuple[Finding, ...]:
        """List what is over its limit."""
        return tuple(f for f in self.findings if f.verdict == "over")

    @property
    def passed(self) -> bool:
        return self.measured["tokens"] > 0 and not self.over

    def summary(self) -> str:
        """Say in one line what is over its limit."""
        if not self.measured["tokens"]:
            return "nothing was compared"
        return ", ".join(f"{f.name} {_short(f.value)} over {_short(f.limit)}" for f in self.over) or "within its limits"

    def figures(self) -> dict[str, Any]:
        """Give the measurement with what was decided on it, as JSON can hold it."""
        return {
            **self.measured,
            "margin_error": next(f.value for f in self.findings if f.name == "margin_error"),
            "limits": {f.name: f.limit for f in self.findings if f.limit is not None},
            "verdicts": {f.name: f.verdict for f in self.findings},
            "passed": self.passed,
        }


def judge(measured: Mapping[str, Any], config: AuditConfig, dtype: str, beta: float, per_token: bool) -> Judgement:
    """Hold a measurement (`audit.measure`) against the recipe's limits, or the defaults of the compute type.

    Token drift is judged on any sample: one wrong token is a fact. Bias and margin error are estimates with a chance error,
    taken as three standard errors. One of fewer than 16 groups is called too few; so is one whose chance error is larger than
    its limit, unless it is over by more than that. So a tiny sample fails by no accident, and passes as one that says little.

    Args:
        per_token: the objective compares log-ratios per token, so the margin's error is taken per token too.
    """
    m = measured
    limits = DEFAULT_LIMITS[dtype] | config.model_dump(include=set(DEFAULT_LIMITS[dtype]), exclude_none=True)
    margin = beta * m["margin_error_nats_per_token" if per_token else "margin_error_nats"]
    groups, paired = m["groups"], m["paired_groups"]
    # Pairs of one group share completions, so groups are what is counted: the standard error of a standard deviation.
    margin_chance = STANDARD_ERRORS * margin / math.sqrt(2 * (paired - 1)) if paired >= FEWEST_GROUPS else math.inf
    bias_chance = STANDARD_ERRORS * m["signed_bias_error"] if groups >= FEWEST_GROUPS else math.inf
    judged = {
        "max_token_drift": ("max_token_drift", m["max_token_drift"], 0.0),
        "mean_token_drift": ("max_mean_drift", m["mean_token_drift"], 0.0),
        "signed_bias": ("max_bias", m["signed_bias"], bias_chance),
        "margin_error": ("max_margin_error", margin, margin_chance),
    }
    findings = [
        Finding(name, value, limits[field], field, _verdict(abs(value), limits[field], chance), MEANINGS[name])
        for name, (field, value, chance) in judged.items()
    ]
    shown = ("length_correlation", "multiplicative_error")
    findings += [Finding(name, m[name], None, None, "not judged", MEANINGS[name]) for name in shown]
    return Judgement(measured, tuple(findings))


def _verdict(size: float, limit: float, chance: float) -> Verdict:
    if size > limit + chance:
        return "over"
    if chance > limit:
        return "too few"
    return "over" if size > limit else "within"


def goes_on(config: AuditConfig, dtype: str, beta: float, per_token: bool, measured: Mapping[str, Any]) -> bool:
    """Say whether to train after such a measurement. Loads no torch: Ray Train's controller unpickles it."""
    return config.on_drift == "warn" or judge(measured, config, dtype, beta, per_token).passed


MEANINGS = {
    "max_token_drift": "Largest difference of one token. A few tokens far off, the rest not: they were scored as other tokens or "
    "after another prompt (template, truncation, a reused cache).",
    "mean_token_drift": "Mean size of a token's difference. All tokens off: other weights, another or no adapter, or another dtype.",
    "signed_bias": "Mean difference with its sign. A bias adds up over a completion: it rewards or punishes length.",
    "margin_error": "beta × standard deviation of the error of a pair's reference margin: noise in every pair's reward, which stays "
    "the same in every epoch and so does not average out.",
    "length_correlation": "Correlation of a pair's error with its difference in length. Far from 0: a bias per token, completions "
    "cut otherwise, or end-of-turn tokens.",
    "multiplicative_error": "Mean of exp |difference|, 1 where all agrees. Not judged by itself: the limits on token drift bound it.",
}


def check_drift(judgement: Judgement, config: AuditConfig, engine: str) -> None:
    """Stop where the reference is not within its limits and the recipe does not say to go on all the same.

    Raises:
        AuditError: names every statistic that is over, its value, its limit, its usual cause, and the groups that drift most.
    """
    if judgement.passed or config.on_drift == "warn":
        return
    fix = "set reference.audit.on_drift=use_trainer, which scores all again with the trainer's own forward pass"
    if engine == "trainer":
        fix = "the trainer differs from itself: look whether the model, its adapter or the store's files changed meanwhile"
    fields = " and ".join(f"reference.audit.{f.field}" for f in judgement.over)
    raise AuditError(
        "\n  ".join(["the stored reference log-probs are not the trainer's own", *described(judgement)]),
        where="reference.audit",
        fix=f"{fix}; or, knowing the cause, raise {fields}"
        if fields
        else "look at the schedule: it has no tokens to compare",
    )


def described(judgement: Judgement) -> list[str]:
    """Say line by line what was compared, what is over its limit and what that usually means."""
    m = judgement.measured
    lines = [f"compared: {m['groups']:,} groups, {m['pairs']:,} pairs, {m['tokens']:,} completion tokens"]
    shown = list(judgement.over)
    if shown and abs(m["length_correlation"]) > SHOWN_CORRELATION and m["paired_groups"] >= FEWEST_GROUPS:
        shown += [f for f in judgement.findings if f.name == "length_correlation"]
    for f in shown:
        limit = f", over {_short(f.limit)}" if f.limit is not None else ""
        lines.append(f"{f.name} {_short(f.value)}{limit}. {f.meaning}")
    if m["worst_groups"]:
        worst = ", ".join(f"{g['group_id']} ({_short(g['max_token_drift'])})" for g in m["worst_groups"])
        lines.append(f"groups that drift most: {worst}")
    return lines


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
