"""The audit's statistics on arrays made by hand, and its verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_ray.config.reference import AuditConfig
from dpo_ray.reference.audit import MAX_MEAN_DRIFT, MAX_TOKEN_DRIFT, AuditResult, audit


def arrays(*groups: list[list[float]]) -> list[list[np.ndarray]]:
    return [[np.array(c, np.float32) for c in group] for group in groups]


TRAINER = arrays([[-1.0, -2.0], [-3.0]], [[-1.0], [-1.0, -1.0, -1.0]], [[-4.0]])
# differences:    +1/4  -1/2    0          0      1/4  1/4  1/4         -1/8
STORED = arrays([[-0.75, -2.5], [-3.0]], [[-1.0], [-0.75, -0.75, -0.75]], [[-4.125]])


def check(stored=STORED, trainer=TRAINER, beta=0.5, dtype="bfloat16", **limits: float) -> AuditResult:
    return audit(stored, trainer, beta, dtype, AuditConfig(**limits))


def test_statistics() -> None:
    result = check()
    drift = [0.25, -0.5, 0, 0, 0.25, 0.25, 0.25, -0.125]
    assert (result.groups, result.tokens) == (3, 8)
    assert result.mean_token_drift == sum(map(abs, drift)) / 8
    assert result.max_token_drift == 0.5
    assert result.signed_bias == sum(drift) / 8
    # Errors of the two pairs' margins: (0.25 - 0.5) - 0 and 0 - 0.75; lengths differ by 1 and -2.
    assert result.margin_error_std == pytest.approx(0.5 * 0.25)
    assert result.length_correlation == pytest.approx(1.0)
    assert result.multiplicative_error == pytest.approx(sum(math.exp(abs(d)) for d in drift) / 8)


def test_the_sign_is_stored_minus_trainer() -> None:
    assert check(TRAINER, STORED).signed_bias == -check().signed_bias


def test_agreement_has_no_drift_and_passes() -> None:
    result = check(TRAINER, TRAINER, dtype="float32")
    assert result.passed
    assert (result.max_token_drift, result.margin_error_std, result.length_correlation) == (0, 0, 0)
    assert result.multiplicative_error == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_tolerances_go_by_type(dtype: str) -> None:
    result = check(dtype=dtype)
    assert (result.allowed_token_drift, result.allowed_mean_drift) == (MAX_TOKEN_DRIFT[dtype], MAX_MEAN_DRIFT[dtype])


def shifted(by: float, one: float = 0.0) -> list[list[np.ndarray]]:
    moved = [[c + np.float32(by) for c in group] for group in TRAINER]
    moved[1][1][1] += np.float32(one)
    return moved


@pytest.mark.parametrize(
    ("by", "one", "passed"),
    [
        (0.0, 0.0, True),
        (5e-6, 0.0, True),
        (5e-5, 0.0, False),  # every token a little: the mean
        (0.0, 6e-5, True),
        (0.0, 3e-4, False),  # one token much: the largest
    ],
)
def test_verdicts_in_float32(by: float, one: float, passed: bool) -> None:
    assert check(shifted(by, one), dtype="float32").passed is passed


def test_the_recipes_limits_rule() -> None:
    assert not check().passed
    assert check(max_token_drift=0.5, max_mean_drift=0.25).passed  # a limit that is just met
    assert not check(max_token_drift=0.49, max_mean_drift=0.25).passed
    assert not check(max_token_drift=0.5, max_mean_drift=0.2).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_pass(value: float) -> None:
    stored = arrays(*[[c.tolist() for c in group] for group in TRAINER])
    stored[0][0][0] = value
    with np.errstate(invalid="ignore"):
        assert not check(stored, max_token_drift=1e9, max_mean_drift=1e9).passed


def test_nothing_compared_is_nothing_shown() -> None:
    result = check([], [])
    assert not result.passed
    assert (result.groups, result.tokens, result.max_token_drift) == (0, 0, 0)


def test_single_completions_have_no_margin() -> None:
    result = check(arrays([[-1.0]], [[-2.0]]), arrays([[-1.0]], [[-2.5]]))
    assert (result.margin_error_std, result.length_correlation) == (0, 0)
    assert result.max_token_drift == 0.5


def test_arrays_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        check(STORED[:2], TRAINER)
    with pytest.raises(ValueError, match="zip"):
        check(arrays([[-1.0]]), arrays([[-1.0], [-1.0]]))


def test_figures_are_plain_numbers() -> None:
    assert {type(v) for v in check().figures().values()} <= {int, float, bool}
