"""From a packed micro-batch to the input of losses: sums, weights and labels, by hand and in Python's own floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpo_ray.config.objective import AotObjective, AotUnpairedObjective
from dpo_ray.config.shaping import ForwardKl, ShapingConfig
from dpo_ray.data.groups import Group
from dpo_ray.models.packed_rows import PackedRows, packed_rows
from dpo_ray.models.token_logps import TokenScores
from dpo_ray.objectives.select import step_loss
from dpo_ray.objectives.step_logps import StepLogps, Totals, joined, labels, step_logps, weight_sums
from dpo_ray.schedule.micro_batch import pack

NAN = float("nan")
TOTALS = Totals(pairs=4.0, labelled=1.0, lists=1.0, chosen_tokens=10.0, tokens=1.0)
# Log-probs of tokens under the policy and under the reference, by completion; all are exact in float32.
PAIR = ([[-1.0, -2.0, -0.5], [-4.0]], [[-1.5, -1.0, -0.25], [-2.0]])
RANKED = ([[-0.5], [-1.0, -3.0], [-2.0, -2.0]], [[-0.75], [-2.0, -2.0], [-1.0, -0.5]])


def group(
    number: int,
    logps: tuple[list[list[float]], list[list[float]]],
    scores: list[float],
    pairs: tuple[tuple[int, int], ...] = (),
    weight: float = 1.0,
    probability: float = 1.0,
) -> Group:
    """Build a group with a prompt of two tokens, whose completions are as long as their log-probs."""
    return Group(
        group_id=bytes([number]) * 16,
        prompt_ids=np.array([1, 2], np.int32),
        completion_ids=tuple(np.arange(len(c), dtype=np.int32) for c in logps[0]),
        scores=np.array(scores, np.float32),
        chosen=np.array([c for c, _ in pairs], np.int32),
        rejected=np.array([r for _, r in pairs], np.int32),
        preference_probability=probability,
        weight=weight,
        reference_token_logps=tuple(np.array(c, np.float32) for c in logps[1]),
    )


# A pair that weighs 2, and a ranking of three completions that weighs 0.5 and has two pairs.
GROUPS = [
    group(1, PAIR, [1, 0], ((0, 1),), weight=2.0, probability=0.75),
    group(2, RANKED, [1, 2, 0], ((1, 0), (1, 2)), weight=0.5),
]
TOKEN_LOGPS = [x for of_group, _ in (PAIR, RANKED) for completion in of_group for x in completion]


def logps_of(
    shaping: ShapingConfig | None = None, log_collision: list[float] | None = None, totals: Totals = TOTALS
) -> StepLogps:
    collision = None if log_collision is None else torch.tensor(log_collision)
    scores = TokenScores(torch.tensor(TOKEN_LOGPS), log_collision=collision)
    return step_logps(scores, packed_rows(pack(GROUPS)), shaping or ShapingConfig(), totals)


def test_log_probs_are_summed_by_completion_and_selected_by_pair() -> None:
    logps = logps_of(ShapingConfig(divergence=ForwardKl()))
    assert logps.policy.tolist() == [-3.5, -4.0, -0.5, -4.0, -4.0]
    assert logps.reference.tolist() == [-2.75, -2.0, -0.75, -4.0, -1.5]
    assert logps.logratio.tolist() == [-0.75, -2.0, 0.25, 0.0, -2.5]
    assert logps.lengths.tolist() == [3, 1, 1, 2, 2]
    assert logps.weight.tolist() == [2, 2, 0.5, 0.5, 0.5]
    assert logps.scores.tolist() == [1, 0, 1, 2, 0]
    assert logps.group.tolist() == [0, 0, 1, 1, 1]
    pairs = logps.pairs
    assert pairs.policy_chosen.tolist() == [-3.5, -4.0, -4.0]
    assert pairs.policy_rejected.tolist() == [-4.0, -0.5, -4.0]
    assert pairs.reference_chosen.tolist() == [-2.75, -4.0, -4.0]
    assert pairs.reference_rejected.tolist() == [-2.0, -0.75, -1.5]
    assert pairs.chosen_tokens.tolist() == [3, 2, 2]
    assert pairs.rejected_tokens.tolist() == [1, 1, 2]
    assert pairs.preference_probability.tolist() == [0.75, 1, 1]
    assert pairs.mean_chosen_tokens == 10.0 / 4.0
    assert pairs.divergence == ForwardKl()
    assert logps.pair_weight.tolist() == [2, 0.5, 0.5]
    assert logps.policy_weight.tolist() == [1, 1, 1]


def test_length_desensitisation_weighs_tokens_beyond_the_shorter_one() -> None:
    """LD-DPO: only the first completion of three tokens and the pair (2, 1) have tokens beyond the other's length."""
    pairs = logps_of(ShapingConfig(ld_alpha=0.25)).pairs
    assert pairs.policy_chosen.tolist() == [-1 + 0.25 * -2.5, -1 + 0.25 * -3, -4]
    assert pairs.policy_rejected.tolist() == [-4, -0.5, -4]
    assert pairs.reference_chosen.tolist() == [-1.5 + 0.25 * -1.25, -2 + 0.25 * -2, -4]
    assert pairs.reference_rejected.tolist() == [-2, -0.75, -1.5]


def test_wpo_weighs_a_pair_by_both_of_its_completions() -> None:
    """WPO, eq. 3: the product of the two completions' weights, each exp of the mean of log p - log sum p^2."""
    collision = [-0.5, -1.0, -0.75, -1.5, -0.25, -2.0, -0.5, -1.0, -1.25]
    own, start = [], 0
    for n in (3, 1, 1, 2, 2):
        excess = [TOKEN_LOGPS[i] - collision[i] for i in range(start, start + n)]
        own.append(math.exp(sum(excess) / n))
        start += n
    expected = [own[0] * own[1], own[3] * own[2], own[3] * own[4]]
    assert len({round(x, 3) for x in own}) == 5  # so that no side could stand for the other
    weights = logps_of(ShapingConfig(wpo=True), collision).policy_weight
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)


def test_wpo_weights_are_constants_for_the_gradient() -> None:
    """WPO, below eq. 4: the weights are not trained; otherwise the policy would gain by making bad pairs unlikely."""
    token_logps = torch.tensor(TOKEN_LOGPS, requires_grad=True)
    scores = TokenScores(token_logps, log_collision=torch.zeros(len(TOKEN_LOGPS)))
    logps = step_logps(scores, packed_rows(pack(GROUPS)), ShapingConfig(wpo=True), TOTALS)
    assert logps.policy.requires_grad
    assert not logps.policy_weight.requires_grad


def rows_of(*groups: Group) -> PackedRows:
    return packed_rows(pack(groups))


def lone(number: int, label: float, weight: float = 1.0) -> Group:
    return group(number, ([[-1.0, -1.0]], [[-1.0, -1.0]]), [label], weight=weight)


def test_sums_of_weights_by_hand() -> None:
    """A pair, a ranking with pairs, two labelled completions, and a filler, which weighs nothing."""
    filler = group(9, PAIR, [1, 0], ((0, 1),), weight=0.0)
    sums = weight_sums(rows_of(*GROUPS, lone(3, 1.0), lone(4, 0.0, weight=4.0), filler))
    assert sums.dtype == torch.float64
    assert sums.tolist() == [
        2.0 + 2 * 0.5,  # pairs
        # The ranking's middle completion loses one pair, as its last does; the best is chosen twice.
        2 * 2.0 + 3 * 0.5 + 1.0 + 4.0,
        2.0 + 0.5,  # groups with unequal scores
        2.0 * 3 + 0.5 * 2 + 0.5 * 2,  # tokens of chosen completions
        6.0 + 7.0 + 4.0 + 4.0 + 6.0,  # all tokens, with those of prompts and of the filler
    ]


def test_completions_without_a_label_are_not_counted() -> None:
    chain = group(1, RANKED, [2, 1, 0], ((0, 1), (1, 2)), weight=2.0)  # the middle one is chosen and rejected
    assert weight_sums(rows_of(chain)).tolist()[1] == 2 * 2.0


def test_a_list_counts_once_and_only_if_its_scores_differ() -> None:
    tied = group(1, RANKED, [1, 1, 1], weight=8.0)
    best_last = group(2, RANKED, [0, 0, 1], weight=2.0)
    with_mismatched = group(3, RANKED, [1, 2, NAN])
    assert weight_sums(rows_of(tied, best_last, with_mismatched)).tolist()[2] == 2.0 + 1.0


def test_labels_of_pairs_rankings_and_single_completions() -> None:
    chain = group(1, RANKED, [2, 1, 0], ((0, 1), (1, 2)))  # the middle one is chosen once and rejected once
    one_pair = group(2, RANKED, [2, 1, 0], ((0, 1),))  # the last one is in no pair
    ranking = group(3, RANKED, [1, 3, 0])
    ties = group(4, RANKED, [1, 1, 0])
    with_mismatched = group(5, PAIR, [1, NAN])  # one completion of its own
    assert labels(rows_of(chain)).tolist() == [1, 0, -1]
    assert labels(rows_of(one_pair)).tolist() == [1, -1, 0]
    assert labels(rows_of(ranking)).tolist() == [0, 1, -1]
    assert labels(rows_of(ties)).tolist() == [1, 1, -1]
    assert labels(rows_of(with_mismatched)).tolist() == [1, 0]
    all_tied = group(6, RANKED, [1, 1, 1])
    assert labels(rows_of(all_tied, ranking)).tolist() == [0, 0, 0, 0, 1, -1]
    assert labels(rows_of(lone(6, 0.0), lone(7, 0.5), lone(8, 1.0))).tolist() == [-1, -1, 1]
    groups = (chain, one_pair, ranking, lone(6, 0.0))
    assert labels(rows_of(*groups)).tolist() == [1, 0, -1, 1, -1, 0, 0, 1, -1, -1]


def test_totals_are_the_sums_and_nothing_is_divided_by_zero() -> None:
    totals = Totals.of([4.0, 3.0, 2.0, 10.0, 50.0])
    assert totals == Totals(pairs=4.0, labelled=3.0, lists=2.0, chosen_tokens=10.0, tokens=50.0)
    assert totals.mean_chosen_tokens == 2.5
    assert Totals.of([0.0] * 5) == Totals(1.0, 1.0, 1.0, 1.0, 1.0)


def test_micro_batches_are_joined_and_their_groups_stay_apart() -> None:
    whole, parts = logps_of(), []
    first = 0
    for one in GROUPS:
        n = sum(len(c) for c in one.completion_ids)
        scores = TokenScores(torch.tensor(TOKEN_LOGPS[first : first + n]))
        parts.append(step_logps(scores, rows_of(one), ShapingConfig(), TOTALS))
        first += n
    both = joined(parts)
    for name in ("policy", "reference", "lengths", "weight", "scores", "label", "pair_weight", "policy_weight"):
        assert torch.equal(getattr(both, name), getattr(whole, name)), name
    for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "chosen_tokens"):
        assert torch.equal(getattr(both.pairs, name), getattr(whole.pairs, name)), name
    same = both.group[:, None] == both.group[None, :]
    assert torch.equal(same, whole.group[:, None] == whole.group[None, :])
    three = joined([parts[0], parts[0], parts[1]]).group.tolist()
    assert [[a == b for b in three] for a in three] == [[a == b for b in "aabbccc"] for a in "aabbccc"]
    alone = joined(parts[1:])
    assert torch.equal(alone.policy, parts[1].policy)
    assert alone.pairs.mean_chosen_tokens == 2.5


def test_a_detached_copy_has_no_gradients() -> None:
    policy = torch.tensor(TOKEN_LOGPS, requires_grad=True)
    logps = step_logps(TokenScores(policy), rows_of(*GROUPS), ShapingConfig(), TOTALS)
    assert logps.policy.requires_grad
    assert logps.pairs.policy_chosen.requires_grad
    copy = logps.detached("cpu")
    assert not copy.policy.requires_grad
    assert not copy.pairs.policy_chosen.requires_grad
    assert copy.policy.tolist() == logps.policy.tolist()
    elsewhere = logps.detached("meta")  # a device without memory, on any machine
    assert {elsewhere.policy.device.type, elsewhere.pairs.policy_chosen.device.type} == {"meta"}


def test_a_completion_of_another_prompt_is_one_without_a_score() -> None:
    rows = rows_of(group(1, PAIR, [1, NAN]))
    logps = step_logps(TokenScores(torch.tensor([-1.0] * 4)), rows, ShapingConfig(), TOTALS)
    assert logps.is_mismatched.tolist() == [False, True]


@pytest.mark.parametrize("objective", [AotObjective(beta=0.5), AotUnpairedObjective(beta=0.5)], ids=lambda o: o.type)
def test_a_filler_is_not_among_the_pairs_of_a_loss_over_the_step(
    objective: AotObjective | AotUnpairedObjective,
) -> None:
    """Ranks without a group compute fillers, so how many there are depends on the number of workers."""
    filler = group(9, ([[0.0], [0.0]], [[0.0], [0.0]]), [1, 0], ((0, 1),), weight=0.0)
    scores = TokenScores(torch.tensor([*TOKEN_LOGPS, 0.0, 0.0]))
    padded = step_logps(scores, rows_of(*GROUPS, filler), ShapingConfig(), TOTALS)
    assert len(padded.pair_weight) == 4
    assert step_loss(objective, padded, TOTALS).item() == step_loss(objective, logps_of(), TOTALS).item()
