"""Groups of random ids and lengths for the tests of order, packing and storage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from dpo_ray.data.groups import Group
from dpo_ray.data.schemas import TOKENS


def group_id(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def make_group(number: int, most_completions: int = 4, longest: int = 12) -> Group:
    """Make a group that is a function of its number; weights and probabilities are exact in float32.

    It has all pairs of unequal scores: often none, and up to six.
    """
    rng = np.random.default_rng(number)
    lengths = rng.integers(1, longest + 1, rng.integers(1, most_completions + 1))
    prompt_ids = rng.integers(0, 1000, rng.integers(1, longest + 1), dtype=np.int32)
    completion_ids = tuple(rng.integers(0, 1000, n, dtype=np.int32) for n in lengths)
    scores = rng.integers(0, 3, len(lengths))
    chosen, rejected = np.nonzero(scores[:, None] > scores[None, :])
    return Group(
        group_id=group_id(number),
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        scores=scores.astype(np.float32),
        chosen=chosen,
        rejected=rejected,
        preference_probability=float(rng.choice([0.5, 0.75, 1.0])),
        weight=float(rng.choice([0.25, 1.0, 2.0])),
        reference_token_logps=tuple(-rng.random(n, dtype=np.float32) for n in lengths),
    )


def group_table(numbers: Iterable[int]) -> pa.Table:
    """Write groups as a table of tokens with their log-probs, as a schedule is built from."""
    groups = [make_group(number) for number in numbers]
    columns = {field.name: [getattr(group, field.name) for group in groups] for field in TOKENS}
    table = pa.table({name: pa.array(values, TOKENS.field(name).type) for name, values in columns.items()})
    logps = pa.array([group.reference_token_logps for group in groups], pa.list_(pa.list_(pa.float32())))
    return table.append_column("token_logps", logps)
