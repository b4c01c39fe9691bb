"""The granule, the unit of scoring: groups with the completions that the store lacks, scored and committed together."""

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
    "kills_engine": "an engine died twice while it scored this group",
    "no_log_probs": "the model gives no finite log-probs for this group",
}
"""Why a group has no reference log-probs, by reason code."""


@dataclass(frozen=True)
class Unscored:
    """A group that cannot be scored."""

    group_id: bytes
    reason: str  # a key of REASONS
    detail: str


@dataclass(frozen=True)
class Scored:
    """The result of scoring one granule, or a piece of a granule that was split. Its log-probs are in the store."""

    groups: int
    sequences: int  # distinct sequences
    tokens: int  # of prompts and completions; the prompt counts once for each sequence
    cached_tokens: int  # those of `tokens` that were read from the engine's cache
    rescored: int  # sequences that were scored again without the cache
    seconds: float
    engine: str  # its name in the pool
    unscored: tuple[Unscored, ...] = ()
    granule: int = 0  # number of the granule, in the order in which the run received the granules
