"""What each objective of a recipe learns from."""

from __future__ import annotations

from dpo_ray.config.objective import IpoObjective, SigmoidObjective
from dpo_ray.objectives.select import compares_per_token, needs_pairs


def test_pairwise_objectives_need_pairs() -> None:
    assert needs_pairs(SigmoidObjective())
    assert needs_pairs(IpoObjective())


def test_ipo_alone_compares_per_token() -> None:
    assert compares_per_token(IpoObjective())
    assert not compares_per_token(SigmoidObjective())
