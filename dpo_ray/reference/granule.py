"""The granule: a batch of groups that one engine scores and commits at once.

It contains only the completions whose log-probs the store lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

GRANULE = pa.schema(
    [
        ("group_id", pa.binary(16)),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),  # only those that the store lacks, at least one
    ]
)

REASONS = {
    "kills_engine": "two engines died while they scored this group",
    "no_log_probs": "the model gives no finite log-probs for this group",
}
"""Explanations of why a group has no reference log-probs, by reason code."""


@dataclass(frozen=True)
class Unscored:
    """A group (a prompt with its completions) that cannot be scored, and why."""

    group_id: bytes
    reason: str  # a key of REASONS
    detail: str


@dataclass(frozen=True)
class Scored:
    """The counts of scoring one granule, or one piece of a granule that was split. The log-probs are in the store."""

    groups: int
    sequences: int  # distinct sequences
    tokens: int  # of prompts and completions; a prompt counts once for each of its completions
    cached_tokens: int  # those of `tokens` that were read from the engine's cache
    rescored: int  # sequences that were scored again without the cache
    seconds: float
    engine: str  # its name in the pool
    unscored: tuple[Unscored, ...] = ()
    granule: int = 0  # number of the granule, counted from 0 in the order of the run's input
