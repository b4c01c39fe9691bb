"""The preference pairs that both sides of the training benchmark learn from, as token ids with the reference's log-probs.

Needs numpy and torch alone, so that it works on a machine without dpo_ray's other packages, and in TRL's environment.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

LOWEST_TOKEN = 3  # below are the special ones


class PairRow(NamedTuple):
    """A pair as token ids, and the reference's log-prob of every token of both completions, in nats."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    reference_chosen: list[float]
    reference_rejected: list[float]

    @property
    def lengths(self) -> tuple[int, int, int]:
        return len(self.prompt_ids), len(self.chosen_ids), len(self.rejected_ids)


class Lengths(NamedTuple):
    """Lognormal lengths in tokens: the median of each part, and the deviation of the logarithm."""

    prompt: float
    chosen: float
    rejected: float
    deviation: float = 0.0


def made_rows(lengths: Lengths, count: int, vocabulary: int, longest: int, seed: int = 0) -> list[PairRow]:
    """Draw pairs of random tokens whose parts have such lengths; no pair is longer than `longest` in either completion.

    The reference's log-probs are 0 until `dpo_ray_side.add_reference` fills them in.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        drawn = np.array(lengths[:3]) * np.exp(lengths.deviation * rng.standard_normal(3))
        prompt, chosen, rejected = np.maximum(np.round(drawn), 2).astype(int)
        prompt = min(prompt, longest // 2)
        ids = [
            rng.integers(LOWEST_TOKEN, vocabulary, min(n, longest - prompt if i else longest)).tolist()
            for i, n in enumerate((prompt, chosen, rejected))
        ]
        rows.append(PairRow(ids[0], ids[1], ids[2], [0.0] * len(ids[1]), [0.0] * len(ids[2])))
    return rows


def token_ratio(rows: Sequence[PairRow]) -> float:
    """Tokens with each prompt twice over tokens with each prompt once: (2P + C + R) / (P + C + R)."""
    prompts, chosen, rejected = np.array([row.lengths for row in rows]).sum(axis=0)
    return float((2 * prompts + chosen + rejected) / (prompts + chosen + rejected))


def padded_share(rows: Sequence[PairRow], batch: int) -> float:
    """Share of padding where each batch's completions, each with its prompt, are padded to the longest of them."""
    sequences = np.array([[p + c, p + r] for p, c, r in (row.lengths for row in rows)])
    batches = [sequences[i : i + batch] for i in range(0, len(rows), batch)]
    return 1 - sequences.sum() / sum(b.size * b.max() for b in batches)


def write_rows(rows: Sequence[PairRow], path: Path) -> None:
    path.write_text(json.dumps([row._asdict() for row in rows]))


def read_rows(path: Path) -> list[PairRow]:
    return [PairRow(**row) for row in json.loads(path.read_text())]
