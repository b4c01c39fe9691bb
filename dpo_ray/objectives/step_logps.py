"""The input of the losses for a micro-batch or a whole step: flat tensors over completions and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dpo_ray.config.shaping import ShapingConfig
from dpo_ray.models.packed_rows import PackedRows
from dpo_ray.models.token_logps import TokenScores, sum_by_completion

from .pairs import PairLogps
from .shaping import desensitised, policy_weight


@dataclass(frozen=True)
class Totals:
    """Sums of weights over a global step (all ranks and micro-batches), by which losses are divided."""

    pairs: float
    labelled: float  # completions with a label
    lists: float  # groups whose completions have different scores
    chosen_tokens: float  # tokens of chosen, weighted by pair
    tokens: float  # tokens that the forward passes compute

    @classmethod
    def of(cls, sums: Sequence[float]) -> Totals:
        """Build the totals from sums in the order of the fields.

        A sum of 0 becomes 1, so that a division by it is possible; the numerator is then 0 as well.
        """
        return cls(*(value or 1.0 for value in sums))

    @property
    def mean_chosen_tokens(self) -> float:
        return self.chosen_tokens / self.pairs


@dataclass(frozen=True)
class StepLogps:
    """The log-probs of completions and of pairs, with their weights. Tensors of the policy have gradients."""

    policy: Tensor  # float32 [completions]
    reference: Tensor  # float32 [completions]
    lengths: Tensor  # float32 [completions]
    weight: Tensor  # float32 [completions]; 0 = filler
    scores: Tensor  # float32 [completions]; NaN = a completion of another prompt
    label: Tensor  # float32 [completions]: 1 desirable, -1 undesirable, 0 neither
    group: Tensor  # int64 [completions]
    pairs: PairLogps
    pair_weight: Tensor  # float32 [pairs]
    policy_weight: Tensor  # float32 [pairs]: WPO's weight; 1 without WPO

    @property
    def logratio(self) -> Tensor:
        """The log-ratio: log pi(y|x) - log pi_ref(y|x)."""
        return self.policy - self.reference

    @property
    def is_mismatched(self) -> Tensor:
        return self.scores.isnan()

    def detached(self, device: torch.device | str) -> StepLogps:
        """Return a copy on `device`, without gradients."""
        return _mapped(self, lambda t: t.detach().to(device))


def step_logps(scores: TokenScores, rows: PackedRows, shaping: ShapingConfig, totals: Totals) -> StepLogps:
    """Sum the token log-probs of each completion, and collect the sums of each pair's chosen and rejected completion.

    The recipe's `shaping` (f-divergence, LD-DPO, WPO) is applied to the pairs.
    """
    policy = sum_by_completion(scores.logps, rows)  # [completions]
    reference = sum_by_completion(rows.reference_token_logps, rows)
    lengths = rows.lengths.float()
    c, r = rows.chosen, rows.rejected
    sides = policy[c], policy[r], reference[c], reference[r]
    if shaping.ld_alpha != 1.0:
        known = rows.reference_token_logps
        sides = tuple(
            desensitised(logps, rows.lengths, own, other, shaping.ld_alpha)
            for logps in (scores.logps, known)
            for own, other in ((c, r), (r, c))
        )
    pairs = PairLogps(
        *sides,
        chosen_tokens=lengths[c],
        rejected_tokens=lengths[r],
        preference_probability=rows.preference_probability,
        mean_chosen_tokens=totals.mean_chosen_tokens,
        divergence=shaping.divergence,
    )
    weights = torch.ones_like(rows.pair_weight)
    if shaping.wpo:
        assert scores.log_collision is not None  # noqa: S101 - the forward pass was run with statistics
        likely = policy_weight(scores.logps, scores.log_collision, rows.completion_of_row, rows.lengths)
        weights = likely[c] * likely[r]
    return StepLogps(
        policy=policy,
        reference=reference,
        lengths=lengths,
        weight=rows.completion_weight,
        scores=rows.scores,
        label=labels(rows),
        group=rows.group_of_completion,
        pairs=pairs,
        pair_weight=rows.pair_weight,
        policy_weight=weights,
    )


def labels(rows: PackedRows) -> Tensor:
    """Compute the label of each completion, 1 desirable, -1 undesirable, 0 neither: float32 [completions].

    If a group has pairs, a completion is desirable if it is chosen in a pair and rejected in none, and undesirable if
    it is rejected in a pair and chosen in none. In a ranking without pairs, the best completion is desirable and the
    worst undesirable, unless all scores are equal. The label of a single completion follows from its score.
    """
    label = torch.zeros_like(rows.scores)
    judged = ~rows.scores.isnan()
    in_group = torch.zeros_like(rows.group_of_completion).index_add(0, rows.group_of_completion, judged.long())
    single = judged & (in_group[rows.group_of_completion] == 1)
    label = torch.where(single, torch.where(rows.scores > 0.5, 1.0, -1.0), label)
    wins, loses = torch.zeros_like(label), torch.zeros_like(label)
    wins[rows.chosen], loses[rows.rejected] = 1.0, 1.0
    above = _above(rows)
    ranked = above.any(dim=1).float() * ~above.any(dim=0) - above.any(dim=0).float() * ~above.any(dim=1)
    paired = torch.zeros_like(label).index_add(0, rows.group_of_completion, wins + loses)[rows.group_of_completion] > 0
    return torch.where(single, label, torch.where(paired, wins - loses, ranked))


def _above(rows: PackedRows) -> Tensor:
    """Return bool [completions, completions]: [i, j] is True if i and j are in the same group and i has the higher score."""
    same = rows.group_of_completion[:, None] == rows.group_of_completion[None, :]
    return same & (rows.scores[:, None] > rows.scores[None, :])


def weight_sums(rows: PackedRows) -> Tensor:
    """Compute the contribution of one micro-batch to `Totals`, in the order of its fields: float64 [5]."""
    weight, pair_weight = rows.completion_weight.double(), rows.pair_weight.double()
    same = rows.group_of_completion[:, None] == rows.group_of_completion[None, :]  # [completions, completions]
    above = _above(rows)
    is_first, is_ranked = ~same.tril(-1).any(dim=1), above.any(dim=0) | above.any(dim=1)
    return torch.stack(
        [
            pair_weight.sum(),
            (weight * labels(rows).abs()).sum(),
            (weight * is_first * is_ranked).sum(),
            (pair_weight * rows.lengths[rows.chosen]).sum(),
            weight.new_tensor(float(rows.tokens)),
        ]
    )


def joined(parts: Sequence[StepLogps]) -> StepLogps:
    """Concatenate the log-probs of several micro-batches. Groups get new numbers, so that no two groups have the same number."""
    apart, offset = [], 0
    for part in parts:
        apart.append(replace(part, group=part.group + offset))
        offset += len(part.group)  # at least the number of its groups
    first = apart[0]
    pairs = replace(
        first.pairs, **{name: torch.cat([getattr(p.pairs, name) for p in apart]) for name in _tensors(first.pairs)}
    )
    columns = {name: torch.cat([getattr(p, name) for p in apart]) for name in _tensors(first)}
    return replace(first, pairs=pairs, **columns)


def _tensors(item: StepLogps | PairLogps) -> list[str]:
    return [f.name for f in fields(item) if isinstance(getattr(item, f.name), Tensor)]


def _mapped(item: StepLogps, change) -> StepLogps:
    pairs = replace(item.pairs, **{name: change(getattr(item.pairs, name)) for name in _tensors(item.pairs)})
    return replace(item, pairs=pairs, **{name: change(getattr(item, name)) for name in _tensors(item)})
