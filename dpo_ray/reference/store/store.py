"""The reference store: token log-probs, found by a key that is a hash of the model, its numerics and the token ids.

The store only grows, and all runs with the same location share it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.digest import digest
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError, InfrastructureError

from .index import KEY, StoreIndex, as_keys
from .segment import (
    SEGMENT,
    TOKEN_LOGPS,
    are_logps,
    key_column,
    new_name,
    read_keys,
    read_values,
    stamp_nanoseconds,
    to_bytes,
)

__all__ = ["KEY", "SEGMENT", "Numerics", "ReferenceStore", "StoreIndex"]

logger = logging.getLogger(__name__)
ABOUT = "about.json"
USED = "used.json"
MARK_SECONDS = 3600  # USED, the file with the time of last use, is written at most once in this time
READ_THREADS = 8  # segments read concurrently: an object store has a high latency, but serves many requests at once
LISTINGS = 3  # attempts to list and read all segments, in case another process deletes some of them meanwhile
GROUPS_AT_ONCE = 16_384  # groups whose token ids are copied at once for hashing


@dataclass(frozen=True)
class Numerics:
    """Everything that can change a log-prob, except for the model's weights and the token ids."""

    engine: str  # vllm | trainer
    version: str  # of the engine
    device: str  # cpu | cuda
    dtype: str
    head_dtype: str  # dtype of the matrix that computes the logits; log-softmax is always float32
    tensor_parallel: int = 1  # above 1, sums are split over GPUs, which changes their rounding

    def tag(self) -> dict[str, str | int]:
        return asdict(self)


@dataclass(frozen=True)
class ReferenceStore:
    """The log-probs of one model with its numerics: one directory of the store (a partition). Can be pickled.

    A partition consists of segments: Parquet files that are written completely or not at all, and are never changed. So
    writers do not conflict, and readers need no lock. If two writers work at the same time, a key may be in several
    segments; the oldest segment counts.
    """

    root: Storage
    model_digest: str
    numerics: Numerics
    partition: Storage = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "partition", self.root.child(partition_name(self.model_digest, self.numerics.tag())))

    def key(self, prompt_ids: Sequence[int] | np.ndarray, completion_ids: Sequence[int] | np.ndarray) -> bytes:
        """Compute the key of a completion: a hash (16 bytes) of the model, its numerics and the exact token ids."""
        h = self._hash()
        for ids in (prompt_ids, completion_ids):
            h.update(len(ids).to_bytes(4, "little"))
            h.update(np.asarray(ids, np.int32).tobytes())
        return h.digest()

    def keys(self, table: pa.Table) -> np.ndarray:
        """Compute the keys of all completions of a table, group by group in the order of the rows.

        Args:
            table: one group per row, without nulls; columns `prompt_ids` (list of int32) and `completion_ids` (list of
                lists of int32).

        Returns:
            KEY [completions]; the same values as `key` returns for each completion.
        """
        root, digests = self._hash(), []
        for batch in table.select(["prompt_ids", "completion_ids"]).to_batches(max_chunksize=GROUPS_AT_ONCE):
            completion_ids = batch["completion_ids"]
            if completion_ids.null_count:
                raise ValueError("no key can be computed for a group with nulls")
            prompts, prompt_ends = _hashable(batch["prompt_ids"])
            completions, completion_ends = _hashable(completion_ids.flatten())
            begin, c, at = 0, 0, 0  # start of the next prompt's bytes; next completion; start of its bytes
            for end, count in zip(prompt_ends, np.diff(completion_ids.offsets).tolist(), strict=True):
                of_prompt = root.copy()
                of_prompt.update(prompts[begin:end])
                begin = end
                for completion_end in completion_ends[c : c + count]:
                    of_completion = of_prompt.copy()
                    of_completion.update(completions[at:completion_end])
                    digests.append(of_completion.digest())
                    at = completion_end
                c += count
        return np.frombuffer(b"".join(digests), KEY)

    def segments(self) -> list[str]:
        """List the committed segments, oldest first."""
        return list_partition(self.partition)[0]

    def index(self, segments: Sequence[str] | None = None, known: StoreIndex | None = None) -> StoreIndex:
        """Read the keys of the segments, return an index of them, and record that the store is in use.

        A damaged segment is skipped with a warning. Sequences that are only in this segment are scored again.

        Args:
            segments: read only these segments; None: read all.
            known: an existing index. Only segments that are not in `known` are read; the result also has its keys.

        Raises:
            ArtifactError: another process keeps deleting segments during the reading.
        """
        for _ in range(LISTINGS):
            names, foreign = list_partition(self.partition)
            for name in foreign:
                logger.warning("%s: this is not a file of the reference store; ignored", self.partition.full_path(name))
            if names:
                mark_used(self.partition)
            names = names if segments is None else segments
            if known is not None:
                names = sorted(set(names) - {*known.segments, *known.damaged})
            try:
                new = read_index(self.partition, names)
            except FileNotFoundError:  # `dpo-ray store gc` has merged this segment into another since the listing
                continue
            return new if known is None else known.joined(new)
        raise vanished(self.partition)

    def fetch(self, index: StoreIndex, keys: Sequence[bytes] | np.ndarray) -> pa.ListArray:
        """Read the log-probs of each key: lists of float32 [n], in the order of `keys`. A key may occur twice.

        Each segment is read at most once, and of each segment only the row groups with these keys. If a segment has
        been deleted since the index was built, a new index is built, and all keys are read again.

        Raises:
            ArtifactError: a key is not in the store, or its segment is damaged.
        """
        keys = as_keys(keys)
        try:
            return self._fetch(index, keys)
        except FileNotFoundError:
            pass
        try:
            return self._fetch(self.index(), keys)
        except FileNotFoundError as error:
            raise vanished(self.partition) from error

    def append(self, keys: Sequence[bytes] | np.ndarray, token_logps: Sequence[np.ndarray] | pa.ListArray) -> str:
        """Write log-probs to the store, as one new segment (file); return the name of the segment.

        When this method returns, the segment is committed and survives a crash.

        Args:
            keys: [n], the key of each completion.
            token_logps: [n], the log-probs of each completion: float32 [completion tokens].

        Raises:
            ArtifactError: a value is not finite or is above 0, so it is not a log-prob and must not be stored.
            ValueError: a key does not have 16 bytes, or the numbers of keys and completions differ.
        """
        keys, values = as_keys(keys), as_lists(token_logps)
        if not are_logps(values.flatten().to_numpy()):
            raise ArtifactError(
                "an engine returned values that cannot be log-probs",
                where=self.partition.uri,
                fix="run again; if the error persists, set reference.engine=trainer and report it",
            )
        data = to_bytes(key_column(keys), values)
        mark_used(self.partition)  # before anything is written that `dpo-ray store gc` could treat as unused
        if not self.partition.exists(ABOUT):
            about = {"model_digest": self.model_digest, "numerics": self.numerics.tag()}
            self.partition.write(ABOUT, json.dumps(about, indent=1).encode())
        name = new_name()
        self.partition.write(name, data, rows=len(keys))
        return name

    def _hash(self) -> hashlib.blake2b:
        identity = f"{self.model_digest} {json.dumps(self.numerics.tag(), sort_keys=True)}".encode()
        return hashlib.blake2b(identity, digest_size=KEY.itemsize)

    def _fetch(self, index: StoreIndex, keys: np.ndarray) -> pa.ListArray:
        positions = index.positions(keys)
        if (positions < 0).any():
            raise ArtifactError(
                f"the store has no log-probs for the key {keys[np.argmin(positions)].tobytes().hex()}",
                where=self.partition.uri,
                fix="run again: missing log-probs will be computed",
            )
        return read_places(self.partition, index.segments, index.segment[positions], index.row[positions])


def partition_name(model_digest: str, numerics: dict[str, str | int]) -> str:
    """Build the name of the directory (partition) for one model and its numerics."""
    return f"{model_digest[:16]}-{digest(numerics)[:12]}"


def list_partition(partition: Storage) -> tuple[list[str], list[str]]:
    """Return two lists: a partition's segments, oldest first; and the files that do not belong to the store."""
    names = partition.list_files()
    segments = [name for name in names if stamp_nanoseconds(name) is not None]
    return segments, sorted(set(names) - {*segments, ABOUT, USED})


def vanished(partition: Storage) -> ArtifactError:
    """Build the error that is raised when segments are deleted while they are being read."""
    fix = "wait until `dpo-ray store gc` has ended, then run again"
    return ArtifactError("segments were deleted while they were being read", where=partition.uri, fix=fix)


def read_index(partition: Storage, names: Sequence[str]) -> StoreIndex:
    """Read the keys of segments, several concurrently, and build an index of them.

    A damaged segment is logged and listed in the index as damaged.

    Raises:
        FileNotFoundError: a segment does not exist, or has been deleted.
    """

    def keys_or_error(name: str) -> np.ndarray | ArtifactError:
        try:
            return read_keys(partition, name)
        except ArtifactError as error:
            return error

    with ThreadPoolExecutor(READ_THREADS) as pool:
        results = dict(zip(names, pool.map(keys_or_error, names), strict=True))
    valid = {name: keys for name, keys in results.items() if isinstance(keys, np.ndarray)}
    for error in results.values():
        if isinstance(error, ArtifactError):
            logger.warning("%s", error)
    return StoreIndex.of(tuple(valid), tuple(valid.values()), damaged=[name for name in names if name not in valid])


def read_places(partition: Storage, segments: Sequence[str], segment: np.ndarray, row: np.ndarray) -> pa.ListArray:
    """Read the log-probs at places of the store (a segment and a row each). Return them in the order of the places.

    Args:
        segments: names of segments.
        segment: [n], for each place the position of its segment in `segments`.
        row: [n], for each place the row in its segment.

    Raises:
        ArtifactError, FileNotFoundError: for the same reasons as `read_values`.
    """
    order = np.lexsort((row, segment))
    cuts = np.flatnonzero(np.diff(segment[order])) + 1
    wanted = [(segments[int(segment[at[0]])], row[at].astype(np.int64)) for at in np.split(order, cuts) if len(at)]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        pieces = list(pool.map(lambda piece: read_values(partition, *piece), wanted))
    here = np.empty(len(order), np.int64)
    here[order] = np.arange(len(order))
    return pa.concat_arrays([pa.array([], TOKEN_LOGPS), *pieces]).take(pa.array(here))


def as_lists(token_logps: Sequence[np.ndarray] | pa.ListArray) -> pa.ListArray:
    """Convert log-probs to a column of float32 lists, without creating a Python object for each value."""
    if isinstance(token_logps, pa.ListArray):
        return token_logps
    ends = np.cumsum([0, *(len(logps) for logps in token_logps)], dtype=np.int32)
    values = np.concatenate([np.empty(0, np.float32), *token_logps], dtype=np.float32, casting="same_kind")
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))


def mark_used(partition: Storage) -> None:
    """Record the current time as the partition's last use, unless a time was recorded in the last hour.

    If the time cannot be written, log a warning.
    """
    try:
        if time.time() - (marked_unix_seconds(partition) or 0.0) >= MARK_SECONDS:
            partition.write(USED, json.dumps({"unix_seconds": time.time()}).encode())
    except (ArtifactError, InfrastructureError) as error:
        logger.warning("the use of the reference store could not be recorded: %s", error)


def marked_unix_seconds(partition: Storage) -> float | None:
    """Return the Unix time that `mark_used` recorded last; None if no time was recorded, or if it cannot be read."""
    try:
        return float(json.loads(partition.read_bytes(USED))["unix_seconds"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _hashable(lists: pa.ListArray) -> tuple[memoryview, list[int]]:
    """Concatenate lists of token ids into the bytes that are hashed: for each list its length, then its ids, as int32.

    Returns:
        The bytes; and for each list, the position in bytes where it ends.
    """
    offsets, values = lists.offsets.to_numpy(), lists.flatten().to_numpy()
    lengths = np.diff(offsets)
    if lists.null_count or len(values) != offsets[-1] - offsets[0]:
        raise ValueError("no key can be computed for token ids with nulls")
    content = np.insert(values.astype(np.int32, copy=False), offsets[:-1] - offsets[0], lengths.astype(np.int32))
    return content.data.cast("B"), (content.itemsize * np.cumsum(lengths + 1)).tolist()
