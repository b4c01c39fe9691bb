"""Gradient norms and clipping over all shards."""

from __future__ import annotations

from torch import nn


def clip_gradients(policy: nn.Module, max_norm: float | None) -> tuple[float, dict[str, float]]:
    """Scale gradients down to `max_norm` over all shards; return the norm before, and by group of parameters."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm if max_norm is not None else float("inf"))
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[attr-defined]
    return float(whole), {}
