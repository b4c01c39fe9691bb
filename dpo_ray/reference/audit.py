"""The audit: do the stored reference log-probs agree with the training stack's own forward pass?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpo_ray.config.reference import AuditConfig
from dpo_ray.errors import AuditError

# Nats. bfloat16's own rounding noise is about 0.03 a token, so only gross errors can be told from it.
MAX_TOKEN_DRIFT = {"float32": 1e-4, "bfloat16": 0.5}
MAX_MEAN_DRIFT = {"float32": 1e-5, "bfloat16": 0.05}


@dataclass(frozen=True)
class AuditResult:
    """The statistics of stored minus trainer log-probs, in nats, over the tokens and pairs of a sample."""

    groups: int
    tokens: int
    mean_token_drift: float  # mean |d|
    max_token_drift: float
    signed_bias: float  # mean d: a bias rewards length
    margin_error_std: float  # beta * std of the error of a pair's reference margin
    length_correlation: float  # of that error with the difference in length
    multiplicative_error: float  # mean exp |d|
    allowed_token_drift: float
    allowed_mean_drift: float
    passed: bool

    def figures(self) -> dict[str, float | int | bool]:
        return asdict(self)


def audit(
    stored: Sequence[Sequence[np.ndarray]],
    trainer: Sequence[Sequence[np.ndarray]],
    beta: float,
    dtype: str,
    config: AuditConfig,
) -> AuditResult:
    """Compare token log-probs, groups x completions x float32 [tokens]; the margin is that of the first two completions.

    A sample without tokens shows nothing, so it does not pass.
    """
    drift = [
        [np.asarray(s, np.float64) - np.asarray(t, np.float64) for s, t in zip(a, b, strict=True)]
        for a, b in zip(stored, trainer, strict=True)
    ]
    flat = np.concatenate([np.zeros(0), *(d for group in drift for d in group)])
    size = np.abs(flat)
    pairs = [group for group in drift if len(group) >= 2]
    errors = np.array([g[0].sum() - g[1].sum() for g in pairs])
    lengths = np.array([len(g[0]) - len(g[1]) for g in pairs], np.float64)
    allowed = config.max_token_drift or MAX_TOKEN_DRIFT[dtype]
    allowed_mean = config.max_mean_drift or MAX_MEAN_DRIFT[dtype]
    mean, most = _mean(size), float(size.max(initial=0.0))
    return AuditResult(
        groups=len(drift),
        tokens=len(flat),
        mean_token_drift=mean,
        max_token_drift=most,
        signed_bias=_mean(flat),
        margin_error_std=float(beta * errors.std()) if len(errors) else 0.0,
        length_correlation=_correlation(errors, lengths),
        multiplicative_error=_mean(np.exp(size)),
        allowed_token_drift=allowed,
        allowed_mean_drift=allowed_mean,
        passed=len(flat) > 0 and most <= allowed and mean <= allowed_mean,
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def checked_audit(
    beta: float, dtype: str, config: AuditConfig, stored: list[list[np.ndarray]], trainer: list[list[np.ndarray]]
) -> dict[str, Any]:
    """Audit a sample and return the figures; runs in the training workers, before step 1.

    Raises:
        AuditError: out of tolerance, and the recipe says to stop.
    """
    result = audit(stored, trainer, beta, dtype, config)
    if not result.passed and config.on_drift == "stop":
        raise AuditError(
            f"stored reference log-probs differ from the trainer's own by up to {result.max_token_drift:.2e} nats a token "
            f"(allowed {result.allowed_token_drift:.0e}), {result.mean_token_drift:.2e} on average "
            f"(allowed {result.allowed_mean_drift:.0e})",
            where="reference.audit",
            fix="set reference.engine=trainer, which is exact; or, knowing the cause, raise reference.audit.max_token_drift",
        )
    return result.figures()


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else 0.0
