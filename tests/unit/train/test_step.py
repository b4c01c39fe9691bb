"""One optimizer step: packing changes nothing, fillers count for nothing, and what is not finite changes no weight."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_ray.config.objective import IpoObjective, Objective, SigmoidObjective
from dpo_ray.errors import TrainError
from dpo_ray.models.packed_rows import PackedRows, packed_rows
from dpo_ray.schedule.build import pair_weight
from dpo_ray.schedule.micro_batch import Group, pack
from dpo_ray.schedule.records import filler
from dpo_ray.train.optimizer import build_optimizer
from dpo_ray.train.step import MEASURES, pair_logps, train_step

from .making import distance, make_groups, make_policy, optimizer_config, rows_of, weights_of

OBJECTIVES = [SigmoidObjective(beta=0.5, label_smoothing=0.1), IpoObjective(beta=0.3)]


def after_step(
    batches: list[PackedRows], weight: float, objective: Objective, max_grad_norm: float | None = 1.0
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    policy = make_policy()
    optimizer = build_optimizer(policy, optimizer_config())
    measured = train_step(policy, batches, weight, objective, optimizer, max_grad_norm)
    return measured, weights_of(policy)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.type)
def test_packing_changes_nothing(objective: Objective) -> None:
    groups = make_groups(4)
    weight = sum(pair_weight(g) for g in groups)
    measured, weights = after_step([rows_of(groups)], weight, objective)
    assert distance(weights, weights_of(make_policy())) > 1e-3  # the step is felt
    for cut in ([groups[:1], groups[1:2], groups[2:3], groups[3:]], [groups[2:], groups[:2]]):
        other, other_weights = after_step([rows_of(g) for g in cut], weight, objective)
        assert other == pytest.approx(measured, rel=1e-6, abs=1e-7)
        assert distance(other_weights, weights) < 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.type)
def test_fillers_change_nothing(objective: Objective) -> None:
    groups = make_groups(2)
    rows, nothing = rows_of(groups), packed_rows(filler())
    weight = sum(pair_weight(g) for g in groups)
    measured, weights = after_step([rows], weight, objective)
    padded, padded_weights = after_step([nothing, rows, nothing], weight, objective)
    assert padded == measured
    assert all(torch.equal(padded_weights[n], w) for n, w in weights.items())


def test_the_means_are_weighted_by_pair() -> None:
    groups = make_groups(4)
    objective = SigmoidObjective(beta=0.5)
    weight = sum(pair_weight(g) for g in groups)
    measured, _ = after_step([rows_of(groups)], weight, objective)
    policy, sums = make_policy(), dict.fromkeys(MEASURES, 0.0)
    for group in groups:
        rows = rows_of([group])
        with torch.no_grad():
            pairs = pair_logps(policy(rows), rows)
        chosen = 0.5 * float(pairs.policy_chosen - pairs.reference_chosen)
        rejected = 0.5 * float(pairs.policy_rejected - pairs.reference_rejected)
        values = (
            math.log1p(math.exp(rejected - chosen)),
            chosen,
            rejected,
            chosen - rejected,
            float(chosen > rejected),
            float(pairs.policy_chosen),
            float(pairs.policy_rejected),
        )
        for name, value in zip(MEASURES, values, strict=True):
            sums[name] += group.weight * value / weight
    assert {n: measured[n] for n in MEASURES} == pytest.approx(sums, rel=1e-5)
    assert 0 < measured["rewards/accuracies"] < 1


def test_an_untrained_policy_has_loss_ln_2_and_no_success() -> None:
    groups = make_groups(4)
    with torch.no_grad():
        own = make_policy()(rows_of(groups)).numpy()
    bare = pack(groups)
    rows = packed_rows(type(bare)(**{**vars(bare), "reference_token_logps": own}))
    measured, _ = after_step([rows], sum(pair_weight(g) for g in groups), SigmoidObjective())
    assert measured["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert measured["rewards/accuracies"] == 0.0
    assert abs(measured["rewards/margins"]) < 1e-6


def test_the_gradient_is_that_of_the_loss() -> None:
    """Directional derivative by central differences in the direction of the gradient: d loss = |gradient|."""
    groups, objective = make_groups(3), SigmoidObjective(beta=0.5)
    weight = sum(pair_weight(g) for g in groups)
    policy, rows = make_policy(), rows_of(groups)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    measured = train_step(policy, [rows], weight, objective, optimizer, None)
    norm, step, losses = measured["grad_norm"], 2e-3, {}
    gradients = [p.grad.clone() for p in policy.parameters()]
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(policy.parameters(), gradients, strict=True):
                p.add_(g, alpha=sign * step / norm)
        losses[sign] = train_step(policy, [rows], weight, objective, optimizer, None)["loss"]
        with torch.no_grad():
            for p, g in zip(policy.parameters(), gradients, strict=True):
                p.sub_(g, alpha=sign * step / norm)
    assert (losses[1] - losses[-1]) / (2 * step) == pytest.approx(norm, rel=1e-2)


def test_gradients_are_clipped_to_the_norm_and_reported_before_it() -> None:
    groups, policy = make_groups(3), make_policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = weights_of(policy)
    weight = sum(pair_weight(g) for g in groups)
    free, _ = after_step([rows_of(groups)], weight, SigmoidObjective(beta=0.5), None)
    measured = train_step(policy, [rows_of(groups)], weight, SigmoidObjective(beta=0.5), optimizer, 1e-2)
    assert measured["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-6)
    assert measured["grad_norm"] > 0.1
    moved = sum(float((w - before[n]).norm()) ** 2 for n, w in weights_of(policy).items()) ** 0.5
    assert moved == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("poison", ["weight", "reference"])
def test_what_is_not_finite_stops_before_the_update(poison: str) -> None:
    groups: list[Group] = make_groups(3)
    policy = make_policy()
    optimizer = build_optimizer(policy, optimizer_config())
    train_step(policy, [rows_of(groups)], 2.0, SigmoidObjective(), optimizer, 1.0)  # there is state to spoil
    batches = [rows_of([g]) for g in groups]
    if poison == "weight":
        with torch.no_grad():
            policy.model.get_decoder().norm.weight[3] = float("nan")
    else:
        batches[1].reference_token_logps[0] = float("inf")
    before = weights_of(policy)
    state = {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    with pytest.raises(TrainError, match="not finite"):
        train_step(policy, batches, 2.0, SigmoidObjective(), optimizer, 1.0)
    for name, weight in weights_of(policy).items():
        assert torch.equal(weight.nan_to_num(7e7), before[name].nan_to_num(7e7))
    for p, s in optimizer.state.items():
        assert all(torch.equal(s[k], v) for k, v in state[id(p)].items())
