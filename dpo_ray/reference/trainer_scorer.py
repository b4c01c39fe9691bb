"""Score with the training stack's own forward pass, without gradients: exact, and slower than an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dpo_ray.models.load import load_policy
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.schedule.micro_batch import Group, pack
from dpo_ray.schedule.pack import deal

from .scorer import ScoreRequest, ScorerSettings


class TrainerScorer:
    """The frozen model as the trainer runs it: packed groups, shared prompts, the same kernels."""

    def __init__(self, settings: ScorerSettings) -> None:
        self._device = settings.device
        self._max_batched_tokens = settings.max_batched_tokens
        self.cached_tokens = 0
        self._policy = load_policy(Path(settings.model_dir), getattr(torch, settings.dtype), chunk_tokens=1024)
        self._policy.to(self._device).eval()

    @torch.no_grad()
    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        """Return float32 [completion tokens] for each request, in the order given."""
        members: dict[tuple[int, bytes], list[int]] = {}
        for i, request in enumerate(requests):
            members.setdefault((request.group, request.prompt_ids.tobytes()), []).append(i)
        groups = [
            Group(
                b"",
                requests[ids[0]].prompt_ids,
                tuple(requests[i].completion_ids for i in ids),
                np.zeros(len(ids), np.float32),
            )
            for ids in members.values()
        ]
        tokens = [g.tokens for g in groups]
        order = list(members.values())
        results: dict[int, np.ndarray] = {}
        for batch in deal(tokens, tokens, ranks=1, tokens_per_micro_batch=self._max_batched_tokens)[0]:
            rows = packed_rows(pack([groups[g] for g in batch]), self._device)
            logps = self._policy(rows).float().cpu().numpy()
            ends = np.cumsum(rows.lengths.cpu().numpy())
            owners = [i for g in batch for i in order[g]]
            results.update(zip(owners, np.split(logps, ends[:-1]), strict=True))
        return [results[i] for i in range(len(requests))]

    def close(self) -> None:
        del self._policy
