"""Data types and seeds of sampling: engines sample for granules of prompts, each with the seeds of its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

PROMPTS = pa.schema(
    [
        ("group_id", pa.binary(16)),  # of the prompt
        ("prompt_ids", pa.list_(pa.int32())),
        ("seeds", pa.list_(pa.int64())),  # one for each sample
    ]
)
SAMPLES = pa.schema(
    [
        ("group_id", pa.binary(16)),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
        ("ended", pa.list_(pa.bool_())),  # True: with an end-of-turn token; False: at the token limit
    ]
)


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class Sampled:
    """The result of sampling for a granule, or for a piece of one."""

    table: pa.Table  # of schema SAMPLES
    tokens: int  # number of sampled tokens
    seconds: float
    engine: str
    granule: int = 0


def sample_seed(run_seed: int, round_number: int, prompt_id: bytes, sample: int) -> int:
    """Hash a sample's identity to a seed of 63 bits: restarts give the same samples, and no two share a stream."""
    content = f"{run_seed}/{round_number}/{sample}/".encode() + prompt_id
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def prompt_key(ids: Sequence[int]) -> bytes:
    """Hash a prompt's token ids to 16 bytes."""
    return hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16).digest()


def prompt_table(prompts: Sequence[Sequence[int]], seed: int, number: int, samples: int) -> pa.Table:
    """Build the table of schema PROMPTS that engines sample for: `samples` completions of each prompt.

    Args:
        number: number of the round, on which the samples' seeds depend; 0 for the samples that evaluate policies.
    """
    keys = [prompt_key(ids) for ids in prompts]
    seeds = [[sample_seed(seed, number, key, k) for k in range(samples)] for key in keys]
    return pa.table({"group_id": keys, "prompt_ids": [list(p) for p in prompts], "seeds": seeds}, schema=PROMPTS)
