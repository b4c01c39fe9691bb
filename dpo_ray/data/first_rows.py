"""Checks the first rows of each source before a run starts. They are read, rendered and tokenized as in `prepare`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dpo_ray.data.readers.rows import read_batches
from dpo_ray.errors import DataError

from .admission import ADVICE, REASONS, Rejected
from .first_pass import PrepareTask, tokenized
from .groups import TokenGroup
from .sources import Piece, Shard, field_of

FIRST_ROWS = 100


@dataclass(frozen=True)
class FirstRows:
    """The result of tokenizing the first rows of a source: a group for each admitted row, `Rejected` for each other row."""

    split: str
    name: str
    groups: list[TokenGroup]
    rejected: list[Rejected]


def first_rows(shards: Sequence[Shard], task: PrepareTask) -> Iterator[FirstRows]:
    """Tokenize the first rows of each source, and yield the result.

    For a data set of the hub the result is empty, because the whole data set would have to be downloaded.

    Raises:
        InfrastructureError: a remote storage failed while it was read.
    """
    for _, own in itertools.groupby(shards, key=lambda shard: (shard.split, shard.source)):
        of_source = list(own)
        first = FirstRows(of_source[0].split, of_source[0].name, [], [])
        for shard in of_source:
            wanted = FIRST_ROWS - len(first.groups) - len(first.rejected)
            if shard.kind == "hub" or wanted < 1:
                break
            groups, rejected = first_of_shard(shard, wanted, task)
            first.groups.extend(groups)
            first.rejected.extend(rejected)
        yield first


def first_of_shard(shard: Shard, rows: int, task: PrepareTask) -> tuple[list[TokenGroup], list[Rejected]]:
    """Tokenize the first rows of a shard. Return a group for each admitted row, and `Rejected` for each other row.

    Raises:
        InfrastructureError: a remote storage failed while it was read.
    """
    batch = next(read_batches(Piece(shard), rows), [])
    results = tokenized([row for _, row in batch], shard, task)
    groups = [result for result in results if isinstance(result, TokenGroup)]
    return groups, [result for result in results if isinstance(result, Rejected)]


def check_admitted(found: Sequence[FirstRows], limit: float) -> None:
    """Check that the first rows of a source, and of a split, are not all rejected.

    A source passes this check if a row is admitted, if no row is unsound (settings of the recipe exclude all rows), or
    if `limit` is 1. A split passes if a row is admitted.

    Args:
        limit: data.max_quarantined_fraction.

    Raises:
        DataError: a source or a split does not pass. The error contains the reasons, and advice.
    """
    for source in found:
        faults = [r for r in source.rejected if REASONS[r.reason].kind == "fault"]
        if faults and len(faults) == len(source.groups) + len(source.rejected) and limit < 1:
            raise _refused(source.split, source.name, source.rejected)
    for split, own in itertools.groupby(found, key=lambda source: source.split):
        of_split = list(own)
        rejected = [r for source in of_split for r in source.rejected]
        if rejected and not any(source.groups for source in of_split):
            raise _refused(split, of_split[0].name, rejected)


def _refused(split: str, name: str, rejected: Sequence[Rejected]) -> DataError:
    counts = Counter(r.reason for r in rejected)
    reasons = "; ".join(f"{n:,} {reason} ({REASONS[reason].meaning})" for reason, n in counts.most_common(3))
    reason = counts.most_common(1)[0][0]
    detail = next(r.detail for r in rejected if r.reason == reason)
    default = f"check the format and columns of {field_of(split)}"
    return DataError(
        f"none of the first {len(rejected):,} rows can be used: {reasons}" + (f"; {detail}" if detail else ""),
        where=f"{field_of(split)}, {name}",
        fix=f"{ADVICE.get(reason, default)}; `dpo-ray inspect data RECIPE` shows the rows",
    )
