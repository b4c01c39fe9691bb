"""A world of which every response is known: exact reward, divergence, optimum and frontier of any policy in it.

A policy is a table of log-probs, float64 [prompts, responses]. Its divergence is KL(policy || reference), all prompts alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-9  # of sums of 31,104 float64 terms around 1, amply


@dataclass(frozen=True)
class World:
    """Log-probs of the reference and rewards of all responses, float64 [prompts, responses]."""

    reference: Tensor
    reward: Tensor

    def reward_of(self, policy: Tensor) -> float:
        return float((policy.exp() * self.reward).sum(-1).mean())

    def divergence(self, policy: Tensor) -> float:
        return float((policy.exp() * (policy - self.reference)).sum(-1).mean())

    def objective(self, policy: Tensor, beta: float) -> float:
        """E[r] - beta KL"""
        return self.reward_of(policy) - beta * self.divergence(policy)

    def optimum(self, beta: float) -> float:
        """Return beta log Z, the most of E[r] - beta KL that any policy has (Rafailov et al. 2023, 2305.18290, appendix A.1)."""
        return beta * float((self.reference + self.reward / beta).logsumexp(-1).mean())

    def tilted(self, beta: float) -> Tensor:
        """Return the policy that has it: log of reference * exp(r / beta) / Z."""
        return (self.reference + self.reward / beta).log_softmax(-1)

    def frontier(self, kl: float) -> float:
        """Return the most reward that any policy has at a divergence.

        For every b, E[r] <= b KL + b log Z(b). The least of these bounds is reached, by the tilted reference of that divergence;
        its b is found by bisection, and a b that is a little off still gives a bound.
        """
        low, high = 1e-4, 1e4
        for _ in range(60):
            b = (low * high) ** 0.5
            low, high = (b, high) if self.divergence(self.tilted(b)) > kl else (low, b)
        return high * kl + self.optimum(high)

    def is_beyond(self, policy: Tensor) -> bool:
        """Return whether a policy has more reward than the frontier at its divergence: then something is computed wrongly."""
        return self.reward_of(policy) > self.frontier(self.divergence(policy)) + ROUNDING

    def best_of(self, n: int) -> Tensor:
        """log-probs of the best of n draws from the reference; of equally good ones, any.

        With F the probability of at most a reward, and F- that of less, the best has it with F^n - F-^n. Which of the responses of
        that reward it is, is as probable as in the reference. Written with logs, as F^n underflows.
        """
        return torch.stack([_best_of(n, *row) for row in zip(self.reference, self.reward, strict=True)])


def _best_of(n: int, reference: Tensor, reward: Tensor) -> Tensor:
    _, level = reward.unique(return_inverse=True)  # sorted: levels of reward from the worst to the best
    mass = torch.zeros(int(level.max()) + 1, dtype=reference.dtype).index_add(0, level, reference.exp())
    at_most = mass.cumsum(0)
    share = (mass / at_most).clamp(max=1.0)  # of F that is not F-; all of it for the worst
    best = n * (at_most / at_most[-1]).log() + (-torch.expm1(n * torch.log1p(-share))).log()
    return (reference + (best - mass.log())[level]).log_softmax(-1)
