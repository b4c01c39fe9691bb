"""What each objective of a recipe learns from, and what it cannot be shaped by."""

from __future__ import annotations

from typing import get_args

import pytest

from dpo_ray.config import objective as o
from dpo_ray.config.objective import Objective, Single, SumObjective, Term
from dpo_ray.config.shaping import ShapingConfig

OBJECTIVES: list[Objective] = [cls() for cls in get_args(get_args(o.Single)[0])]
REFERENCE_FREE = {"sft", "orpo", "simpo", "cpo", "slic"}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda x: x.type)
def test_facts(objective: Objective) -> None:
    assert o.uses_reference(objective) == (objective.type not in REFERENCE_FREE)
    assert o.is_step_wide(objective) == (objective.type in {"aot", "aot_unpaired", "kto"})
    assert o.is_per_token(objective) == (objective.type in {"ipo", "sigmoid_norm", "simpo", "orpo"})
    assert o.kinds_of_groups(objective) == {{"kto": "completions", "listwise": "lists"}.get(objective.type, "pairs")}


def test_every_name_that_trl_has_is_there() -> None:
    """TRL 1.16, DPOConfig.loss_type, and the trainers of other names."""
    trl = (
        "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft"
    )
    others = "sigmoid_norm kto orpo simpo cpo dpop slic r_dpo rpo listwise"
    assert {objective.type for objective in OBJECTIVES} == {*trl.split(), *others.split()}


def sum_of(*objectives: Single) -> SumObjective:
    return SumObjective(type="sum", terms=tuple(Term(objective=objective) for objective in objectives))


def test_a_sum_is_what_its_terms_are() -> None:
    mpo = SumObjective(
        type="sum", terms=(Term(weight=0.8, objective=o.SftObjective(beta=0.3)), Term(objective=o.KtoObjective()))
    )
    assert o.uses_reference(mpo)
    assert o.is_step_wide(mpo)
    assert o.reward_beta(mpo) == 0.3
    assert o.kinds_of_groups(mpo) == {"pairs", "completions"}
    assert [weight for weight, _ in o.summands(mpo)] == [0.8, 1.0]


@pytest.mark.parametrize(
    ("shaping", "objective", "field"),
    [
        ({"divergence": "js"}, o.ApoZeroObjective(), "divergence"),
        ({"divergence": "js"}, o.SimpoObjective(), "divergence"),
        ({"ld_alpha": 0.5}, o.KtoObjective(), "ld_alpha"),
        ({"ld_alpha": 0.5}, o.RpoObjective(), "ld_alpha"),
        ({"wpo": True}, o.AotObjective(), "wpo"),
        ({"wpo": True}, o.ListwiseObjective(), "wpo"),
        ({"wpo": True}, sum_of(o.SigmoidObjective(), o.AotObjective()), "wpo"),
        ({"ld_alpha": 0.5}, sum_of(o.RpoObjective(), o.SigmoidObjective()), "ld_alpha"),
    ],
)
def test_what_an_objective_cannot_honour_is_refused(shaping: dict, objective: Objective, field: str) -> None:
    assert [name for name, _ in ShapingConfig(**shaping).problems(objective)] == [field]
    assert not list(ShapingConfig(**shaping).problems(o.SigmoidObjective()))
