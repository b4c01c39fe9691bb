"""The audit: it measures how much the stored reference log-probs differ from the trainer's own forward pass.

The measurement depends neither on the recipe's limits nor on the recipe's beta. If these change, the stored measurement
is compared with the new limits (`audit_limits.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_ray.errors import AuditError
from dpo_ray.schedule.audit_pairs import ComparedGroup

WORST_GROUPS = 3  # number of groups with the largest drift that are listed by id
MAX_POINTS = 64  # number of pairs whose errors are kept for the report
HISTOGRAM_BINS = 41  # odd: the middle bin is centred on zero difference
_LARGEST_EXPONENT = 600.0  # keeps even an extreme drift finite, as JSON requires
_INNER = 0.995  # share of the tokens within the histogram's axis; a few outliers would flatten all other bins


def measure(sample: Sequence[ComparedGroup]) -> dict[str, Any]:
    """Compute statistics of d = (stored log-prob - the trainer's own log-prob), in nats, over a sample of groups.

    A group (a prompt with its completions) that occurs twice counts once. The order of the sample does not matter. The
    error of a pair is the sum of d over its chosen completion minus the sum of d over its rejected completion. This is
    the error that training makes in the reference margin of the pair.

    Returns:
        JSON values by name.
        - Counts: `groups`, `paired_groups` (groups with pairs), `pairs`, `tokens`.
        - Over tokens: `mean_token_drift` and `max_token_drift` (mean and maximum of |d|), `signed_bias` (mean of d),
          `signed_bias_error` (standard error of this mean, where groups count as independent, not tokens; None for a
          single group), and `multiplicative_error` (mean of exp |d|).
        - Over pairs: `margin_error_nats` (standard deviation of the error), `margin_error_nats_per_token` (the same,
          with means of d in place of sums), and `length_correlation` (correlation of the error with the difference in
          length).
        - For the report: `worst_groups`, `drift_histogram` and `pair_errors`.

    Raises:
        AuditError: a log-prob is not finite. Training cannot start with such a model, whatever `on_drift` is.
    """
    groups = [g for _, g in sorted({g.group_id: g for g in sample}.items())]
    drift = [_drift(g) for g in groups]
    by_group = [np.concatenate(completions) for completions in drift]
    flat = np.concatenate([np.zeros(0), *by_group])
    size = np.abs(flat)
    pairs = [
        (d[c].sum() - d[r].sum(), d[c].mean() - d[r].mean(), len(d[c]) - len(d[r]))
        for d, g in zip(drift, groups, strict=True)
        for c, r in zip(g.chosen, g.rejected, strict=True)
    ]
    errors, per_token, lengths = np.array(pairs, np.float64).reshape(-1, 3).T  # each [pairs]
    return {
        "groups": len(groups),
        "paired_groups": sum(len(g.chosen) > 0 for g in groups),
        "pairs": len(pairs),
        "tokens": len(flat),
        "mean_token_drift": _mean(size),
        "max_token_drift": float(size.max(initial=0.0)),
        "signed_bias": _mean(flat),
        "signed_bias_error": _error_of_mean(by_group),
        "multiplicative_error": _mean(np.exp(np.minimum(size, _LARGEST_EXPONENT))) if len(flat) else 1.0,
        "margin_error_nats": float(errors.std()) if pairs else 0.0,
        "margin_error_nats_per_token": float(per_token.std()) if pairs else 0.0,
        "length_correlation": _correlation(errors, lengths),
        "worst_groups": _worst(groups, by_group),
        "drift_histogram": _histogram(flat),
        "pair_errors": {
            "length_difference": [int(n) for n in lengths[:MAX_POINTS]],
            "error_nats": [_short(e) for e in errors[:MAX_POINTS]],
        },
    }


def _drift(group: ComparedGroup) -> list[np.ndarray]:
    """Compute d = (stored - trainer's log-prob) for each completion of a group: float64 [completion tokens]."""
    drift = [s.astype(np.float64) - o.astype(np.float64) for s, o in zip(group.stored, group.own, strict=True)]
    if not all(np.isfinite(d).all() for d in drift):
        owner = "trainer" if not all(np.isfinite(o).all() for o in group.own) else "stored reference"
        raise AuditError(
            f"log-probs of the {owner} are not finite in group {group.group_id.hex()}",
            where="reference.audit",
            fix="check the model's weights (inf, NaN) and model.dtype; bfloat16 and float32 can hold larger values than float16",
        )
    return drift


def _error_of_mean(by_group: Sequence[np.ndarray]) -> float | None:
    """Estimate the standard error of the mean over all tokens. The groups count as a random sample of all groups."""
    if len(by_group) < 2:
        return None
    sums, counts = np.array([g.sum() for g in by_group]), np.array([len(g) for g in by_group])
    residuals = sums - counts * sums.sum() / counts.sum()
    return float(np.sqrt(len(by_group) / (len(by_group) - 1) * np.square(residuals).sum()) / counts.sum())


def _worst(groups: Sequence[ComparedGroup], by_group: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    most = np.array([np.abs(d).max() for d in by_group])
    return [
        {
            "group_id": groups[i].group_id.hex(),
            "max_token_drift": float(most[i]),
            "mean_token_drift": _mean(np.abs(by_group[i])),
        }
        for i in np.argsort(-most, kind="stable")[:WORST_GROUPS]
        if most[i] > 0
    ]


def _histogram(flat: np.ndarray) -> dict[str, Any]:
    """Count the values of d in bins of equal width from -range_nats to range_nats; `beyond` counts the other values.

    If all values are 0, the range is 0 and there are no bins.
    """
    size = np.abs(flat)
    if not size.any():
        return {"range_nats": 0.0, "counts": [], "beyond": 0}
    reach = float(np.quantile(size, _INNER)) or float(size.max())
    counts = np.histogram(flat, bins=HISTOGRAM_BINS, range=(-reach, reach))[0]
    return {"range_nats": reach, "counts": counts.tolist(), "beyond": int(len(flat) - counts.sum())}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else 0.0


def _short(value: float) -> float:
    return float(f"{value:.4g}")
