"""The index of the reference store: sorted arrays with the segment (file) and the row of each key's log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEY = np.dtype("V16")
"""The dtype of an array of keys (16 bytes each): void, because NumPy strips zeros from the end of byte strings."""


def as_keys(keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
    """Convert keys to an array of dtype KEY. An array of this dtype is returned unchanged.

    Raises:
        ValueError: a key does not have 16 bytes.
    """
    if isinstance(keys, np.ndarray):
        if keys.dtype != KEY or keys.ndim != 1:
            raise ValueError(f"the array of keys is {keys.dtype} {keys.shape}, not {KEY} [n]")
        return keys
    if any(len(key) != KEY.itemsize for key in keys):
        raise ValueError(f"a key does not have {KEY.itemsize} bytes")
    return np.frombuffer(b"".join(keys), KEY)


def halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split each key into two halves: KEY [n] becomes two arrays uint64 [n]. NumPy sorts and searches these fast."""
    both = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """Return for each key of an array whether no earlier position of the array has the same key: bool [n]."""
    first, second = halves(keys)
    order = _order(first, second)
    is_first = np.empty(len(keys), bool)
    is_first[order] = _begins_run(first[order], second[order])
    return is_first


@dataclass(frozen=True, eq=False)
class StoreIndex:
    """The location of each key's log-probs: 24 bytes per key, sorted by key, each key once.

    `ReferenceStore.index` builds an index. The index contains only arrays and names, so that Ray can share one copy
    between all processes of a node.
    """

    first: np.ndarray  # uint64 [n], the first half of each key, ascending
    second: np.ndarray  # uint64 [n], the second half of each key; ascending where the first halves are equal
    segment: np.ndarray  # uint32 [n], a position in `segments`
    row: np.ndarray  # uint32 [n], the row in that segment
    segments: tuple[str, ...]
    damaged: tuple[str, ...] = ()  # segments that could not be read; the index lacks their entries

    @classmethod
    def of(cls, segments: Sequence[str], keys: Sequence[np.ndarray], damaged: Sequence[str] = ()) -> StoreIndex:
        """Build the index of some segments.

        If a key occurs several times, the entry in the earliest segment counts; within a segment, the earliest row.

        Args:
            segments: names of the segments.
            keys: the keys of each segment, an array of dtype KEY.
            damaged: names of segments that could not be read.
        """
        rows = [np.arange(len(column), dtype=np.uint32) for column in keys]
        numbers = np.repeat(np.arange(len(keys), dtype=np.uint32), [len(column) for column in keys])
        first, second = halves(np.concatenate([np.empty(0, KEY), *keys]))
        row = np.concatenate([np.empty(0, np.uint32), *rows])
        return _sorted(first, second, numbers, row, tuple(segments), tuple(damaged))

    def joined(self, other: StoreIndex) -> StoreIndex:
        """Return an index with the keys of this index and of `other`, which is an index of other segments.

        If a key is in both, its location in this index counts.
        """
        return _sorted(
            np.concatenate([self.first, other.first]),
            np.concatenate([self.second, other.second]),
            np.concatenate([self.segment, other.segment + np.uint32(len(self.segments))]),
            np.concatenate([self.row, other.row]),
            self.segments + other.segments,
            self.damaged + other.damaged,
        )

    def __len__(self) -> int:
        return len(self.first)

    def find(self, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Return for each key whether the index contains the key (the store then has its log-probs): bool [n]."""
        return self.positions(keys) >= 0

    def positions(self, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Return the position of each key in the index, or -1 if the index does not contain the key: int64 [n]."""
        first, second = halves(as_keys(keys))
        order = np.argsort(first)  # a search in ascending order reads the index once, from beginning to end
        at = np.empty(len(first), np.int64)
        at[order] = np.searchsorted(self.first, first[order])
        # Different keys with equal first halves do not occur by chance. If somebody constructs such keys, this loop
        # steps over them.
        open_ = np.flatnonzero(at < len(self))
        while len(open_ := open_[self.first[at[open_]] == first[open_]]):
            open_ = open_[self.second[at[open_]] != second[open_]]
            at[open_] += 1
            open_ = open_[at[open_] < len(self)]
        known = at < len(self)
        known[known] = (self.first[at[known]] == first[known]) & (self.second[at[known]] == second[known])
        return np.where(known, at, -1)

    def keys_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the keys at the given positions of the index: KEY [n]."""
        return np.stack([self.first[positions], self.second[positions]], axis=1).view(KEY)[:, 0]


def _sorted(
    first: np.ndarray,
    second: np.ndarray,
    segment: np.ndarray,
    row: np.ndarray,
    segments: tuple[str, ...],
    damaged: tuple[str, ...],
) -> StoreIndex:
    order = _order(first, second)
    order = order[_begins_run(first[order], second[order])]
    return StoreIndex(first[order], second[order], segment[order], row[order], segments, damaged)


def _order(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the indices that sort keys by the first half, then by the second. Equal keys keep their order."""
    order = np.argsort(first)  # several times as fast as a stable sort by both halves
    equal = first[order[1:]] == first[order[:-1]]
    tied = np.flatnonzero(np.append(equal, False) | np.insert(equal, 0, False))
    among = order[tied]
    order[tied] = among[np.lexsort((among, second[among], first[among]))]
    return order


def _begins_run(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return for each key of sorted keys whether the key differs from the previous key: bool [n]."""
    begins = np.ones(len(first), bool)
    begins[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return begins
