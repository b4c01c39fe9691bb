"""The index of the reference store: sorted arrays that say in which segment and row a key's log-probs lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEY = np.dtype("V16")
"""A key in an array. Void and not bytes: NumPy strips the zeros at the end of a byte string."""


def as_keys(keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
    """Give keys as an array of KEY; an array of KEY is returned as it is.

    Raises:
        ValueError: a key is not of 16 bytes.
    """
    if isinstance(keys, np.ndarray):
        if keys.dtype != KEY or keys.ndim != 1:
            raise ValueError(f"an array of keys is one-dimensional and of {KEY}, not {keys.shape} of {keys.dtype}")
        return keys
    if any(len(key) != KEY.itemsize for key in keys):
        raise ValueError(f"a key has {KEY.itemsize} bytes")
    return np.frombuffer(b"".join(keys), KEY)


def halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split KEY [n] into two uint64 [n], which NumPy sorts and searches fast; equal pairs are equal keys."""
    both = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """Say of each key whether it is the first of its kind: bool [n]."""
    first, second = halves(keys)
    order = _order(first, second)
    is_first = np.empty(len(keys), bool)
    is_first[order] = _begins_run(first[order], second[order])
    return is_first


@dataclass(frozen=True, eq=False)
class StoreIndex:
    """Where each key's log-probs lie: 24 bytes a key, sorted by key, each key once.

    It holds arrays and names only, so Ray shares one copy between all processes of a node. Make it with
    `ReferenceStore.index`.
    """

    first: np.ndarray  # uint64 [n], the key's first half
    second: np.ndarray  # uint64 [n], its second half; rises where the first halves are equal
    segment: np.ndarray  # uint32 [n], a position in `segments`
    row: np.ndarray  # uint32 [n], the row in that segment
    segments: tuple[str, ...]
    damaged: tuple[str, ...] = ()  # segments that could not be read: what only they hold counts as missing

    @classmethod
    def of(cls, segments: Sequence[str], keys: Sequence[np.ndarray], damaged: Sequence[str] = ()) -> StoreIndex:
        """Index the segments' keys, an array of KEY each. Of equal keys the first segment's, and there the first row, counts."""
        rows = [np.arange(len(column), dtype=np.uint32) for column in keys]
        numbers = np.repeat(np.arange(len(keys), dtype=np.uint32), [len(column) for column in keys])
        first, second = halves(np.concatenate([np.empty(0, KEY), *keys]))
        row = np.concatenate([np.empty(0, np.uint32), *rows])
        return _sorted(first, second, numbers, row, tuple(segments), tuple(damaged))

    def joined(self, other: StoreIndex) -> StoreIndex:
        """Add the keys of another index, of other segments. Keys in both keep their place in this one."""
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
        """Say of each key whether the store has its log-probs: bool [n]."""
        return self.positions(keys) >= 0

    def positions(self, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Return each key's position in the index, -1 where it is not there: int64 [n]."""
        first, second = halves(as_keys(keys))
        order = np.argsort(first)  # searching in order reads the index once, from its beginning to its end
        at = np.empty(len(first), np.int64)
        at[order] = np.searchsorted(self.first, first[order])
        # Equal first halves of different keys do not occur by chance; step over those that somebody made.
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
    """Sort keys, stably: of equal keys, the first comes first. Sorts by the first half, then mends what is equal there."""
    order = np.argsort(first)  # several times as fast as a stable sort by both halves
    equal = first[order[1:]] == first[order[:-1]]
    tied = np.flatnonzero(np.append(equal, False) | np.insert(equal, 0, False))
    among = order[tied]
    order[tied] = among[np.lexsort((among, second[among], first[among]))]
    return order


def _begins_run(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Say of each of the sorted keys whether it differs from the one before."""
    begins = np.ones(len(first), bool)
    begins[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return begins
