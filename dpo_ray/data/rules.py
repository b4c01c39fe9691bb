"""Applies the rules that compare all rows of the data.

They exclude duplicates, opposite preferences, prompts that also occur in held-out data, and groups beyond the number that
their source may contribute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pyarrow as pa

from dpo_ray.config.data import RulesConfig

from .near_duplicates import PERMUTATIONS, SIGNATURE_DTYPE, near_duplicates

ID_DTYPE = np.dtype("S16")
"""A 16-byte id. numpy ignores zero bytes at the end of such values; this is harmless, as all ids have the same length."""


class Outcome(IntEnum):
    """The decision of the rules on a row. All names except ADMITTED and the two for duplicates are codes of REASONS."""

    ADMITTED = 0
    DUPLICATE = 1
    NEAR_DUPLICATE = 2
    CONFLICTING_PAIR = 3
    LEAKED_PROMPT = 4
    OVER_CAP = 5
    OUTSIDE_MIXTURE = 6


@dataclass(frozen=True)
class Candidates:
    """The values of all rows of a split that `select` compares: 52 bytes per row, and 256 more if there are minhashes."""

    group_ids: np.ndarray  # [n] ID_DTYPE
    prompt_hashes: np.ndarray  # [n] ID_DTYPE
    opposite_ids: np.ndarray  # [n] ID_DTYPE; for a group without an opposite its own group_id
    source: np.ndarray  # [n] int32, the index of the row's source among those of the split
    minhashes: np.ndarray | None = None  # [n, PERMUTATIONS] of SIGNATURE_DTYPE

    def __len__(self) -> int:
        return len(self.group_ids)


def candidates(tables: Iterable[tuple[int, pa.Table]]) -> Candidates:
    """Collect the values that `select` compares. `tables` are pairs: the index of a source, and a table of its rows.

    The tables have the columns group_id, prompt_hash and opposite_id of the schema SHARD. Either all of them also have
    the column minhash, or none.
    """
    ids, prompts, opposites = (_Column(ID_DTYPE) for _ in range(3))
    sources, signatures = _Column(np.dtype(np.int32)), _Column(SIGNATURE_DTYPE, PERMUTATIONS)
    for source, table in tables:
        table_ids = _ids(table["group_id"])
        ids.append(table_ids)
        prompts.append(_ids(table["prompt_hash"]))
        absent = table["opposite_id"].is_null().to_numpy()
        opposites.append(np.where(absent, table_ids, _ids(table["opposite_id"])))
        sources.append(np.full(len(table), source, np.int32))
        if "minhash" in table.column_names:
            signatures.append(_signatures(table["minhash"]))
    minhashes = signatures.whole() if signatures.rows else None
    return Candidates(ids.whole(), prompts.whole(), opposites.whole(), sources.whole(), minhashes)


class _Column:
    """An array that grows in place. To collect parts in a list and concatenate them would need twice the memory."""

    def __init__(self, dtype: np.dtype, *shape: int) -> None:
        self.values = np.empty((0, *shape), dtype)
        self.rows = 0

    def append(self, part: np.ndarray) -> None:
        end = self.rows + len(part)
        if end > len(self.values):
            self._resize(max(end, len(self.values) + len(self.values) // 4))
        self.values[self.rows : end] = part
        self.rows = end

    def whole(self) -> np.ndarray:
        self._resize(self.rows)
        return self.values

    def _resize(self, rows: int) -> None:
        self.values.resize((rows, *self.values.shape[1:]), refcheck=False)  # nothing else refers to it yet


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    """Convert a fixed-size binary column to an array without a Python object per row. The value for a null is undefined."""
    parts = [np.empty(0, ID_DTYPE)]
    for chunk in column.chunks:
        buffer = chunk.buffers()[1]
        if len(chunk):
            parts.append(np.frombuffer(buffer, ID_DTYPE, len(chunk), chunk.offset * ID_DTYPE.itemsize))
    return np.concatenate(parts)


def _signatures(column: pa.ChunkedArray) -> np.ndarray:
    if column.null_count:
        raise ValueError(
            f"{column.null_count} of {len(column)} rows have no minhash: the shard was prepared without minhashes"
        )
    joined = b"".join(column.to_pylist())
    return np.frombuffer(joined, SIGNATURE_DTYPE).reshape(len(column), PERMUTATIONS)


def select(
    everything: Candidates,
    held_out_prompts: np.ndarray | None,
    rules: RulesConfig,
    caps: Sequence[int | None],
    weights: Sequence[float | None],
) -> np.ndarray:
    """Decide for every row of a split whether it is admitted. If several rules exclude a row, the first of them is reported.

    The rules apply in this order:
    1. Of exact duplicates, the first row is kept.
    2. If a pair and its opposite both occur, both are excluded.
    3. Rows whose prompt also occurs in held-out data are excluded.
    4. Of near duplicates, the first row is kept.
    5. Each source keeps at most as many groups as its cap.
    6. Each source keeps at most as many groups as its share by weight.

    In rules 1 and 4, rows of a source that the recipe names earlier come first, and within a source, rows with smaller
    group_ids. Rules 5 and 6 keep the rows with the smallest group_ids. As group_ids are hashes, the kept rows are a fair
    sample, which does not depend on the files and their order.

    Args:
        everything: all rows of the split.
        held_out_prompts: ID_DTYPE, prompt hashes that must not be in this split; None if the split itself is held out.
        caps: for each source, the maximum number of groups to keep, or None.
        weights: for each source, its share relative to the other sources. If the weights are None, all groups are kept.

    Returns:
        [n] uint8, an Outcome for each row.
    """
    outcomes = np.full(len(everything), Outcome.ADMITTED, np.uint8)
    outcomes[_duplicates(everything)] = Outcome.DUPLICATE
    if rules.conflicts == "drop":
        outcomes[_conflicting(everything, np.flatnonzero(outcomes == Outcome.ADMITTED))] = Outcome.CONFLICTING_PAIR
    if held_out_prompts is not None and rules.leakage == "drop":
        rows = np.flatnonzero(outcomes == Outcome.ADMITTED)
        leaked = _contained(everything.prompt_hashes[rows], np.unique(held_out_prompts))
        outcomes[rows[leaked]] = Outcome.LEAKED_PROMPT
    order = _by_source_and_id(everything, np.flatnonzero(outcomes == Outcome.ADMITTED))
    if rules.near_duplicates is not None and len(order):
        if everything.minhashes is None:
            raise ValueError("the search for near duplicates needs minhashes, but the rows have none")
        outcomes[near_duplicates(everything.minhashes, order, rules.near_duplicates)] = Outcome.NEAR_DUPLICATE
        order = order[outcomes[order] == Outcome.ADMITTED]
    within_caps = _first_of_each_source(everything.source[order], caps)
    outcomes[order[~within_caps]] = Outcome.OVER_CAP
    order = order[within_caps]
    shares = mixture(np.bincount(everything.source[order], minlength=len(weights)).tolist(), weights)
    outcomes[order[~_first_of_each_source(everything.source[order], shares)]] = Outcome.OUTSIDE_MIXTURE
    return outcomes


def _duplicates(everything: Candidates) -> np.ndarray:
    """Return the rows that have the same content as an earlier row."""
    order = np.lexsort((everything.source, everything.group_ids))  # stable: equal rows of a source keep their order
    ids = everything.group_ids[order]
    return order[1:][ids[1:] == ids[:-1]]


def _conflicting(everything: Candidates, rows: np.ndarray) -> np.ndarray:
    """Return those of `rows` whose opposite preference is also in `rows`. All `rows` must have different content.

    A group and its opposite have the same two ids in exchanged roles. So they become neighbours if the rows are sorted by
    the smaller of the two ids.
    """
    ids, opposite_ids = everything.group_ids[rows], everything.opposite_ids[rows]
    pair_ids = np.where(opposite_ids < ids, opposite_ids, ids)
    order = np.argsort(pair_ids)
    equal = pair_ids[order[1:]] == pair_ids[order[:-1]]
    return rows[np.concatenate([order[:-1][equal], order[1:][equal]])]


def _contained(ids: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Return bool [ids], True for each id that the sorted array `within` contains. numpy's `isin` needs more memory."""
    if not len(within):
        return np.zeros(len(ids), bool)
    places = np.searchsorted(within, ids)
    return within[np.minimum(places, len(within) - 1)] == ids


def _by_source_and_id(everything: Candidates, rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((everything.group_ids[rows], everything.source[rows]))]


def _first_of_each_source(source: np.ndarray, limits: Sequence[int | None]) -> np.ndarray:
    """Return bool [rows], True for the first rows of each source, as many as its limit (None: all). `source` is sorted."""
    counts = np.bincount(source, minlength=len(limits))
    rank = np.arange(len(source)) - (np.cumsum(counts) - counts)[source]
    limit = np.array([count if limit is None else limit for count, limit in zip(counts, limits, strict=True)], np.int64)
    return rank < limit[source]


def mixture(counts: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Compute how many groups each source contributes to a mixture: floor(weight * t).

    t is the largest number for which every source has enough groups. Weights are used as exact decimal numbers: 0.1 and
    0.3 are exactly one to three.
    """
    if not counts or None in weights:
        return list(counts)
    exact = [Fraction(str(weight)) for weight in weights]
    scarcest = min(count / weight for count, weight in zip(counts, exact, strict=True))
    return [math.floor(weight * scarcest) for weight in exact]
