"""The index of the reference store: sorted arrays with the segment and row of each key's log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEY = np.dtype("V16")
"""The dtype of keys in arrays. It is void and not bytes, since NumPy strips zeros from the end of a byte string."""


def as_keys(keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
    """Convert keys to an array of KEY; an array of KEY is returned unchanged.

    Raises:
        ValueError: a key does not have 16 bytes.
    """
    if isinstance(keys, np.ndarray):
        if keys.dtype != KEY or keys.ndim != 1:
            raise ValueError(f"an array of keys must be one-dimensional of {KEY}, not {keys.shape} of {keys.dtype}")
        return keys
    if any(len(key) != KEY.itemsize for key in keys):
        raise ValueError(f"a key must have {KEY.itemsize} bytes")
    return np.frombuffer(b"".join(keys), KEY)


def halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split KEY [n] into two uint64 [n], which NumPy sorts and searches fast; keys are equal iff both halves are."""
    both = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """Return for each key whether it is its first occurrence: bool [n]."""
    first, second = halves(keys)
    order = _order(first, second)
    is_first = np.empty(len(keys), bool)
    is_first[order] = _begins_run(first[order], second[order])
    return is_first


@dataclass(frozen=True, eq=False)
class StoreIndex:
    """The location of each key's log-probs: 24 bytes per key, sorted by key, without duplicates.

    It contains only arrays and names, so Ray shares one copy between all processes of a node. `ReferenceStore.index`
    builds it.
    """

    first: np.ndarray  # uint64 [n], the key's first half
    second: np.ndarray  # uint64 [n], its second half; ascending where the first halves are equal
    segment: np.ndarray  # uint32 [n], a position in `segments`
    row: np.ndarray  # uint32 [n], the row in that segment
    segments: tuple[str, ...]
    damaged: tuple[str, ...] = ()  # segments that could not be read: entries that only they contain count as missing

    @classmethod
    def of(cls, segments: Sequence[str], keys: Sequence[np.ndarray], damaged: Sequence[str] = ()) -> StoreIndex:
        """Build the index of the segments' keys, one array of KEY per segment.

        Of equal keys, the one in the first segment counts, and within a segment the one in the first row.
        """
        rows = [np.arange(len(column), dtype=np.uint32) for column in keys]
        numbers = np.repeat(np.arange(len(keys), dtype=np.uint32), [len(column) for column in keys])
        first, second = halves(np.concatenate([np.empty(0, KEY), *keys]))
        row = np.concatenate([np.empty(0, np.uint32), *rows])
        return _sorted(first, second, numbers, row, tuple(segments), tuple(damaged))

    def joined(self, other: StoreIndex) -> StoreIndex:
        """Add the keys of another index, of other segments; keys in both keep their location in this one."""
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
        """Return for each key whether the store has its log-probs: bool [n]."""
        return self.positions(keys) >= 0

    def positions(self, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Return each key's position in the index, -1 if it is missing: int64 [n]."""
        first, second = halves(as_keys(keys))
        order = np.argsort(first)  # a search in ascending order reads the index once, from beginning to end
        at = np.empty(len(first), np.int64)
        at[order] = np.searchsorted(self.first, first[order])
        # Different keys with equal first halves do not occur by chance; this loop steps over constructed ones.
        open_ = np.flatnonzero(at < len(self))
        while len(open_ := open_[self.first[at[open_]] == first[open_]]):
            open_ = open_[self.second[at[open_]] != second[open_]]
            at[open_] += 1
            open_ = open_[at[open_] < len(self)]
        known = at < len(self)
        known[known] = (self.first[at[known]] == first[known]) & (self.second[at[known]] == second[known])
        return np.where(known, at, -1)

    def keys_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the keys at positions of the index: KEY [n]."""
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
    """Compute the order that sorts keys stably: by the first half, then reordering those with equal first halves."""
    order = np.argsort(first)  # several times as fast as a stable sort by both halves
    equal = first[order[1:]] == first[order[:-1]]
    tied = np.flatnonzero(np.append(equal, False) | np.insert(equal, 0, False))
    among = order[tied]
    order[tied] = among[np.lexsort((among, second[among], first[among]))]
    return order


def _begins_run(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return for each of the sorted keys whether it differs from the previous one: bool [n]."""
    begins = np.ones(len(first), bool)
    begins[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return begins
