"""Data types of sampling, and the seed of each sample. Engines sample completions for granules (batches of prompts)."""

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
    """The completions that an engine sampled for one granule (a batch of prompts), or for a piece of a granule."""

    table: pa.Table  # of schema SAMPLES
    tokens: int  # number of sampled tokens
    seconds: float
    engine: str
    granule: int = 0


def sample_seed(run_seed: int, round_number: int, prompt_id: bytes, sample: int) -> int:
    """Compute the seed (63 bits) of one sample from the run's seed, the round, the prompt and the sample's number.

    So a restart gives the same samples, and no two samples use the same sequence of random numbers.
    """
    content = f"{run_seed}/{round_number}/{sample}/".encode() + prompt_id
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def prompt_key(ids: Sequence[int]) -> bytes:
    """Return a hash of 16 bytes of a prompt's token ids."""
    return hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16).digest()


def prompt_table(prompts: Sequence[Sequence[int]], seed: int, number: int, samples: int) -> pa.Table:
    """Build the table (schema PROMPTS) from which engines sample `samples` completions of each prompt.

    Args:
        number: number of the round, which determines the seeds; 0 for samples that are used to evaluate policies.
    """
    keys = [prompt_key(ids) for ids in prompts]
    seeds = [[sample_seed(seed, number, key, k) for k in range(samples)] for key in keys]
    return pa.table({"group_id": keys, "prompt_ids": [list(p) for p in prompts], "seeds": seeds}, schema=PROMPTS)
