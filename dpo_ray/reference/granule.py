"""The unit of scoring: some groups with the completions that the store lacks, scored and committed at once."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

GRANULE = pa.schema(
    [
        ("group_id", pa.binary(16)),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),  # those that the store lacks, at least one
    ]
)

REASONS = {
    "kills_engine": "an engine died twice while it scored this group",
    "no_log_probs": "the model gives no finite log-probs for it",
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
    """What scoring one granule came to, or a piece of one that was split. Its log-probs are in the store."""

    groups: int
    sequences: int  # different ones
    tokens: int  # of prompts and completions, each prompt once a sequence
    cached_tokens: int  # of these, read from the engine's cache
    rescored: int  # sequences that the guard sent through again without the cache
    seconds: float
    engine: str  # its name in the pool
    unscored: tuple[Unscored, ...] = ()
    granule: int = 0  # its number in the order in which the granules were handed to the run
