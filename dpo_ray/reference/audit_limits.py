"""Comparison of the audit's measurement with limits, and the usual causes if a statistic is above its limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo_ray.config.reference import AuditConfig
from dpo_ray.errors import AuditError

# Nats; keyed by the fields of reference.audit. Measured differences between vLLM and a plain forward pass: in float32,
# 3e-6 on average and at most 2e-5; in bfloat16, 0.03 on average (which its rounding alone explains) and at most 0.2.
# A bias rewards length: 2e-3 per token over 500 tokens is 0.1 of the reward at beta 0.1. A margin error of 0.1 in the
# unit of the loss moves a pair's gradient weight from 0.5 to 0.525, and does so in every epoch.
DEFAULT_LIMITS = {
    # Real models round ten times as much in float32 as models of a few layers; these limits allow for that. A bias of
    # 5e-5 moves the reward margin of two completions that differ by 200 tokens by 1e-3 at beta 0.1.
    "float32": {"max_token_drift": 1e-3, "max_mean_drift": 1e-4, "max_bias": 5e-5, "max_margin_error": 1e-3},
    "bfloat16": {"max_token_drift": 0.5, "max_mean_drift": 0.05, "max_bias": 2e-3, "max_margin_error": 0.1},
}
STANDARD_ERRORS = 3  # an estimate may be wrong by chance by this number of standard errors
FEWEST_GROUPS = 16  # minimum for an estimate: with fewer groups, the standard error itself is unreliable
SHOWN_CORRELATION = 0.5  # a message mentions a correlation that is stronger than this

Verdict = Literal["within", "over", "too few", "not judged"]


@dataclass(frozen=True)
class Finding:
    """One statistic of the audit with its limit, and the verdict: whether the statistic is within the limit."""

    name: str
    value: float
    limit: float | None  # None: the statistic is shown but not judged
    field: str | None  # the field of reference.audit that sets the limit
    verdict: Verdict
    meaning: str


@dataclass(frozen=True)
class Judgement:
    """The findings on all statistics of one measurement.

    The measurement passes if tokens were compared and no statistic is over its limit.
    """

    measured: Mapping[str, Any]
    findings: tuple[Finding, ...]

    @property
    def over(self) -> tuple[Finding, ...]:
        """List the findings that are over their limits."""
        return tuple(f for f in self.findings if f.verdict == "over")

    @property
    def passed(self) -> bool:
        return self.measured["tokens"] > 0 and not self.over

    def summary(self) -> str:
        """Describe in one line which statistics are over their limits."""
        if not self.measured["tokens"]:
            return "nothing was compared"
        return ", ".join(f"{f.name} {_short(f.value)} over {_short(f.limit)}" for f in self.over) or "within its limits"

    def figures(self) -> dict[str, Any]:
        """Return the measurement together with the limits and verdicts, as JSON values."""
        return {
            **self.measured,
            "margin_error": next(f.value for f in self.findings if f.name == "margin_error"),
            "limits": {f.name: f.limit for f in self.findings if f.limit is not None},
            "verdicts": {f.name: f.verdict for f in self.findings},
            "passed": self.passed,
        }


def judge(measured: Mapping[str, Any], config: AuditConfig, dtype: str, beta: float, per_token: bool) -> Judgement:
    """Compare a measurement (the result of `audit.measure`) with limits.

    The limits are those that the recipe sets, and for all others the defaults for `dtype`.

    Token drift is judged on any sample, because even one wrong token is a fault. Bias and margin error are estimates.
    Their sampling error counts as three standard errors, or as infinite with fewer than 16 groups. If an estimate is
    above its limit by more than the sampling error, the verdict is "over". Otherwise, if the sampling error is larger
    than the limit, the verdict is "too few" (groups). In all other cases the estimate itself is compared with the
    limit. So a small sample does not fail by chance, and the verdict shows that the sample is too small.

    Args:
        dtype: the compute dtype.
        per_token: True if the objective uses log-ratios per token. The margin error is then also per token.
    """
    m = measured
    limits = DEFAULT_LIMITS[dtype] | config.model_dump(include=set(DEFAULT_LIMITS[dtype]), exclude_none=True)
    margin = beta * m["margin_error_nats_per_token" if per_token else "margin_error_nats"]
    groups, paired = m["groups"], m["paired_groups"]
    # The standard error of a standard deviation. It counts groups, as the pairs of one group share completions.
    margin_chance = STANDARD_ERRORS * margin / math.sqrt(2 * (paired - 1)) if paired >= FEWEST_GROUPS else math.inf
    bias_chance = STANDARD_ERRORS * m["signed_bias_error"] if groups >= FEWEST_GROUPS else math.inf
    statistics = {
        "max_token_drift": ("max_token_drift", m["max_token_drift"], 0.0),
        "mean_token_drift": ("max_mean_drift", m["mean_token_drift"], 0.0),
        "signed_bias": ("max_bias", m["signed_bias"], bias_chance),
        "margin_error": ("max_margin_error", margin, margin_chance),
    }
    findings = [
        Finding(name, value, limits[field], field, _verdict(abs(value), limits[field], chance), MEANINGS[name])
        for name, (field, value, chance) in statistics.items()
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
    """Return whether training may start: the measurement `measured` passes, or `on_drift` is "warn".

    This module imports no torch, because Ray Train's controller unpickles this function.
    """
    return config.on_drift == "warn" or judge(measured, config, dtype, beta, per_token).passed


MEANINGS = {
    "max_token_drift": "Largest difference of one token. If only a few tokens are far off, they were scored as other tokens or "
    "after another prompt (template, truncation, a reused cache).",
    "mean_token_drift": "Mean absolute difference of a token. If all tokens are off, the cause is usually other weights, "
    "another or a missing adapter, or another dtype.",
    "signed_bias": "Mean difference with its sign. A bias adds up over a completion: it rewards or punishes length.",
    "margin_error": "beta × standard deviation of the error of a pair's reference margin: noise in every pair's reward, which is "
    "the same in every epoch and so does not average out.",
    "length_correlation": "Correlation of a pair's error with its difference in length. If it is far from 0, the cause is usually a "
    "bias per token, completions truncated differently, or end-of-turn tokens.",
    "multiplicative_error": "Mean of exp |difference|; 1 if all values agree. Not judged separately: the limits on token drift "
    "bound it.",
}


def check_drift(judgement: Judgement, config: AuditConfig, engine: str) -> None:
    """Check that the measurement passed. If `on_drift` is "warn", do nothing.

    Raises:
        AuditError: a statistic is over its limit, or no tokens were compared. The error lists each statistic that is
            over its limit, with value, limit and usual cause, and the groups with the largest drift.
    """
    if judgement.passed or config.on_drift == "warn":
        return
    fix = "set reference.audit.on_drift=use_trainer, which scores everything again with the trainer's own forward pass"
    if engine == "trainer":
        fix = "the trainer computed both: check whether the model, its adapter or the store's files have changed"
    fields = " and ".join(f"reference.audit.{f.field}" for f in judgement.over)
    raise AuditError(
        "\n  ".join(["the stored reference log-probs differ from the trainer's own", *described(judgement)]),
        where="reference.audit",
        fix=f"{fix}; or, if you know the cause, raise {fields}"
        if fields
        else "check the schedule: it has no tokens to compare",
    )


def described(judgement: Judgement) -> list[str]:
    """Describe a judgement as lines.

    The lines state what was compared, each statistic over its limit with the usual cause, and the groups with the
    largest drift.
    """
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
