"""Look-up of completions in the reference store. Missing completions are cut into granules (batches for an engine)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_ray.reference.store.index import StoreIndex
from dpo_ray.reference.store.store import ReferenceStore

from .granule import GRANULE


def find_missing(table: pa.Table, store: ReferenceStore, index: StoreIndex) -> tuple[pa.Table, int]:
    """Find the completions of a table of groups whose log-probs the store lacks.

    Args:
        table: one group per row, with the columns group_id, prompt_ids and completion_ids; other columns are ignored.

    Returns:
        First, a table of schema GRANULE: the groups with missing completions, in the order of the rows. Each group
        contains only its missing completions. Second, the number of completions that the store has.
    """
    groups = table.select(GRANULE.names).combine_chunks().cast(GRANULE)
    if not len(groups):
        return GRANULE.empty_table(), 0
    missing = ~index.find(store.keys(groups))  # bool [completions]
    completions = groups["completion_ids"].chunk(0)
    first, last = completions.offsets.to_numpy()[[0, -1]]
    offsets = completions.offsets.to_numpy() - first
    before = np.concatenate([[0], np.cumsum(missing)])  # [completions + 1]: number of missing ones before each
    counts = np.diff(before[offsets])  # [groups]
    kept = np.flatnonzero(counts)
    lists = completions.values.slice(first, last - first).filter(pa.array(missing))
    ends = np.cumsum([0, *counts[kept]], dtype=np.int32)
    columns = {
        "group_id": groups["group_id"].take(pa.array(kept)),
        "prompt_ids": groups["prompt_ids"].take(pa.array(kept)),
        "completion_ids": pa.ListArray.from_arrays(pa.array(ends), lists),
    }
    return pa.table(columns, schema=GRANULE), int(len(missing) - missing.sum())


def cut(tables: Iterable[pa.Table], groups: int) -> Iterator[pa.Table]:
    """Concatenate tables, and cut the result into tables of `groups` rows. The last table may have fewer rows."""
    buffer: list[pa.Table] = []
    rows = 0
    for table in tables:
        buffer.append(table)
        rows += len(table)
        while rows >= groups:
            whole = pa.concat_tables(buffer)
            yield whole.slice(0, groups)
            buffer, rows = [whole.slice(groups)], rows - groups
    if rows:
        yield pa.concat_tables(buffer)


@dataclass(frozen=True)
class LookupProgress:
    """Counts of a look-up since the previous LookupProgress."""

    known_groups: int  # groups whose completions are all in the store
    found: int  # completions that the store has
    granule: bool  # True: a granule follows


def look_up(
    tables: Iterable[pa.Table], store: ReferenceStore, index: StoreIndex, groups_per_granule: int
) -> Iterator[LookupProgress | pa.Table]:
    """Look up all groups of `tables` in the store, and yield granules of the missing completions.

    Before each granule, and once more at the end, yield a LookupProgress with the counts since the previous
    LookupProgress.
    """
    known_groups = found = 0

    def missing() -> Iterator[pa.Table]:
        nonlocal known_groups, found
        for table in tables:
            lacking, here = find_missing(table, store, index)
            known_groups, found = known_groups + len(table) - len(lacking), found + here
            yield lacking

    for granule in cut(missing(), groups_per_granule):
        yield LookupProgress(known_groups, found, granule=True)
        known_groups = found = 0
        yield granule
    yield LookupProgress(known_groups, found, granule=False)
