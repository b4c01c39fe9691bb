"""One optimizer step: packing changes nothing, fillers count for nothing, and what is not finite changes no weight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpo_ray.config.objective import (
    AotObjective,
    AotUnpairedObjective,
    IpoObjective,
    KtoObjective,
    ListwiseObjective,
    Objective,
    OrpoObjective,
    SigmoidObjective,
    SumObjective,
    Term,
    is_step_wide,
)
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.groups import Group
from dpo_ray.errors import TrainError
from dpo_ray.models.packed_rows import PackedRows, packed_rows
from dpo_ray.schedule.files import filler
from dpo_ray.schedule.micro_batch import pack
from dpo_ray.train.optimizers.build import build_optimizer
from dpo_ray.train.step import train_step
from tests.helpers.training import (
    distance,
    make_config,
    make_groups,
    make_policy,
    optimizer_config,
    rows_of,
    weights_of,
)

OBJECTIVES: list[Objective] = [
    SigmoidObjective(beta=0.5, label_smoothing=0.1),
    IpoObjective(beta=0.3),
    AotObjective(beta=0.5),
    KtoObjective(beta=0.5),
    ListwiseObjective(beta=0.5),
    SumObjective(
        type="sum", terms=(Term(weight=0.5, objective=OrpoObjective()), Term(objective=AotUnpairedObjective()))
    ),
]
NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def configured(objective: Objective, max_grad_norm: float | None = 1.0) -> TrainConfig:
    return make_config(objective=objective, optimizer=optimizer_config(max_grad_norm=max_grad_norm))


def after_step(
    batches: list[PackedRows], objective: Objective, max_grad_norm: float | None = 1.0
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    policy = make_policy()
    optimizer = build_optimizer(policy, optimizer_config())
    measured = train_step(policy, batches, configured(objective, max_grad_norm), optimizer)
    return measured, weights_of(policy)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.type)
def test_packing_changes_nothing(objective: Objective) -> None:
    groups = make_groups(4)
    measured, weights = after_step([rows_of(groups)], objective)
    assert distance(weights, weights_of(make_policy())) > 1e-3  # the step is felt
    for cut in ([groups[:1], groups[1:2], groups[2:3], groups[3:]], [groups[2:], groups[:2]]):
        other, other_weights = after_step([rows_of(g) for g in cut], objective)
        assert other == pytest.approx(measured, rel=1e-6, abs=1e-7)
        assert distance(other_weights, weights) < 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.type)
def test_fillers_change_nothing(objective: Objective) -> None:
    groups = make_groups(2)
    rows, nothing = rows_of(groups), packed_rows(filler())
    measured, weights = after_step([rows], objective)
    padded, padded_weights = after_step([nothing, rows, nothing], objective)
    assert padded == pytest.approx(measured, rel=1e-6) if is_step_wide(objective) else padded == measured
    if is_step_wide(objective):  # each micro-batch adds its own share of the gradient of the whole
        assert distance(padded_weights, weights) < 1e-6
    else:
        assert all(torch.equal(padded_weights[n], w) for n, w in weights.items())


def test_the_means_are_weighted_by_pair() -> None:
    groups = make_groups(4)
    objective = SigmoidObjective(beta=0.5)
    measured, _ = after_step([rows_of(groups)], objective)
    policy, sums = make_policy(), dict.fromkeys(NAMES, 0.0)
    weight = sum(g.weight for g in groups)  # one pair each
    for group in groups:
        with torch.no_grad():
            logps = policy(rows_of([group])).logps.double().split([len(c) for c in group.completion_ids])
        own = [float(logp.sum()) for logp in logps]
        known = [float(logp.astype(np.float64).sum()) for logp in group.reference_token_logps]
        (c,), (r,) = group.chosen, group.rejected
        chosen, rejected = 0.5 * (own[c] - known[c]), 0.5 * (own[r] - known[r])
        loss, won = math.log1p(math.exp(rejected - chosen)), float(chosen > rejected)
        values = (loss, chosen, rejected, chosen - rejected, won, own[c], own[r])
        for name, value in zip(NAMES, values, strict=True):
            sums[name] += group.weight * value / weight
    assert {n: measured[n] for n in NAMES} == pytest.approx(sums, rel=1e-5, abs=1e-5)
    assert 0 < measured["rewards/accuracies"] < 1


def test_an_untrained_policy_has_loss_ln_2_and_no_success() -> None:
    groups = make_groups(4)
    with torch.no_grad():
        own = make_policy()(rows_of(groups)).logps.numpy()
    bare = pack(groups)
    rows = packed_rows(type(bare)(**{**vars(bare), "reference_token_logps": own}))
    measured, _ = after_step([rows], SigmoidObjective())
    assert measured["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert measured["rewards/accuracies"] == 0.0
    assert abs(measured["rewards/margins"]) < 1e-6


def test_the_gradient_is_that_of_the_loss() -> None:
    """Directional derivative by central differences in the direction of the gradient: d loss = |gradient|."""
    groups, objective = make_groups(3), SigmoidObjective(beta=0.5)
    policy, rows = make_policy(), rows_of(groups)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    measured = train_step(policy, [rows], configured(objective, None), optimizer)
    norm, step, losses = measured["grad_norm"], 2e-3, {}
    gradients = [p.grad.clone() for p in policy.parameters()]
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(policy.parameters(), gradients, strict=True):
                p.add_(g, alpha=sign * step / norm)
        losses[sign] = train_step(policy, [rows], configured(objective, None), optimizer)["loss"]
        with torch.no_grad():
            for p, g in zip(policy.parameters(), gradients, strict=True):
                p.sub_(g, alpha=sign * step / norm)
    assert (losses[1] - losses[-1]) / (2 * step) == pytest.approx(norm, rel=1e-2)


def test_gradients_are_clipped_to_the_norm_and_reported_before_it() -> None:
    groups, policy = make_groups(3), make_policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = weights_of(policy)
    free, _ = after_step([rows_of(groups)], SigmoidObjective(beta=0.5), None)
    measured = train_step(policy, [rows_of(groups)], configured(SigmoidObjective(beta=0.5), 1e-2), optimizer)
    assert measured["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-6)
    assert measured["grad_norm"] > 0.1
    moved = sum(float((w - before[n]).norm()) ** 2 for n, w in weights_of(policy).items()) ** 0.5
    assert moved == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("poison", ["weight", "reference"])
def test_what_is_not_finite_stops_before_the_update(poison: str) -> None:
    groups: list[Group] = make_groups(3)
    policy = make_policy()
    optimizer = build_optimizer(policy, optimizer_config())
    train_step(policy, [rows_of(groups)], configured(SigmoidObjective()), optimizer)  # there is state to spoil
    batches = [rows_of([g]) for g in groups]
    if poison == "weight":
        with torch.no_grad():
            policy.model.get_decoder().norm.weight[3] = float("nan")
    else:
        batches[1].reference_token_logps[0] = float("inf")
    before = weights_of(policy)
    state = {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    with pytest.raises(TrainError, match="not finite"):
        train_step(policy, batches, configured(SigmoidObjective()), optimizer)
    for name, weight in weights_of(policy).items():
        assert torch.equal(weight.nan_to_num(7e7), before[name].nan_to_num(7e7))
    for p, s in optimizer.state.items():
        assert all(torch.equal(s[k], v) for k, v in state[id(p)].items())
