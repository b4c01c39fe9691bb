"""Every curve trained, from the model's weights and from moved ones: what the tests compare with TRL's, and sensitivity.py prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_ray.config.train import TrainConfig

from .curves import GOLDEN, Curve, curves, settings_of
from .golden_process import ERROR, ERRORS, Run, train_all
from .tolerance import movements

DRAWS = (1, 2)  # seeds: the tolerance follows the one that goes furthest
Settings = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """The metrics of each case's steps."""

    together: dict[str, Curve]  # by two processes
    alone: dict[str, Curve]  # by one
    draws: dict[str, list[Curve]]  # by one, from moved weights: a curve for each draw
    with_error: dict[str, dict[str, Curve]]  # by one, the first step alone; by error, then by case

    def movements(self, case: str) -> list[float]:
        """Compute how far moved weights take each step of a case, in plain relative tolerances."""
        return movements(self.alone[case], self.draws[case], curves()[case])


def changed(field: str, change: Callable[[float], float], settings: Settings) -> Settings:
    """Return the settings of a case with a field of its objective changed, in each term of it where it is a sum."""

    def of(objective: Settings) -> Settings:
        if "terms" in objective:
            return objective | {"terms": [t | {"objective": of(t["objective"])} for t in objective["terms"]]}
        return objective | ({field: change(objective[field])} if field in objective else {})

    return settings | {"objective": of(TrainConfig(**settings).model_dump()["objective"])}


# Errors of the settings. A label smoothing that is wrong by one part in 10,000 of itself moves no loss as much: this one is
# wrong by 1e-4 of the labels.
WRONG_SETTINGS: dict[str, Callable[[Settings], Settings]] = {
    "beta": lambda settings: changed("beta", lambda beta: beta * (1 + ERROR), settings),
    "label smoothing": lambda settings: changed("label_smoothing", lambda share: share + ERROR, settings),
}
PLANTED = (*ERRORS, *WRONG_SETTINGS)


def train_cases(
    scratch: Path, *, alone: str, together: str | None = None, draws: Sequence[int] = (), errors: Sequence[str] = ()
) -> Trained:
    """Train every case on the golden rows.

    Args:
        alone, together: the layouts in which one process and two train.
        draws: seeds of moved weights.
        errors: names of PLANTED; a case whose objective has nothing that is wrong so is left out.
    """
    cases = curves()

    def runs(layout: str, **options: Any) -> list[Run]:
        return [Run(c, settings_of(c) | {"layout": layout}, steps=len(curve), **options) for c, curve in cases.items()]

    groups: dict[int | str, list[Run]] = {"still": runs(alone)}
    groups |= {seed: runs(alone, draw=seed) for seed in draws}
    groups |= {error: [run for case in cases if (run := wrong_run(case, error, alone))] for error in errors}
    by_two, by_one = train_all(
        GOLDEN, runs(together) if together else [], [run for group in groups.values() for run in group], scratch
    )
    metrics = iter(by_one)
    found = {name: {run.case: next(metrics) for run in group} for name, group in groups.items()}
    return Trained(
        together=dict(zip(cases, by_two, strict=True)) if together else {},
        alone=found["still"],
        draws={case: [found[seed][case] for seed in draws] for case in cases},
        with_error={error: found[error] for error in errors},
    )


def wrong_run(case: str, error: str, layout: str) -> Run | None:
    """Make a run of one step with an error of PLANTED, or nothing where the case has no such setting."""
    settings = settings_of(case) | {"layout": layout}
    if error in ERRORS:
        return Run(case, settings, steps=1, error=error)
    wrong = WRONG_SETTINGS[error](settings)
    return None if TrainConfig(**wrong) == TrainConfig(**settings) else Run(case, wrong, steps=1)
