"""The reference store: token log-probs by content key, append-only, shared by all runs that use its place."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.artifacts.digest import digest
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError

logger = logging.getLogger(__name__)
_SEGMENT_PREFIX = "segment-"
SEGMENT = pa.schema([("key", pa.binary(16)), ("token_logps", pa.list_(pa.float32()))])


@dataclass(frozen=True)
class Numerics:
    """All that a log-prob depends on besides the weights and the tokens."""

    engine: str  # vllm | trainer
    version: str  # of the engine
    device: str  # cpu | cuda
    dtype: str
    head_dtype: str  # of the matrix that makes logits; log-softmax is float32 always
    tensor_parallel: int = 1  # sums are then split over GPUs, and round otherwise

    def tag(self) -> dict[str, str | int]:
        return asdict(self)


@dataclass(frozen=True)
class ReferenceStore:
    """The part of the store that belongs to one model and one way of computing; picklable.

    A segment is a Parquet file that appears whole or not at all and is never changed, so writers do not meet and
    readers need no lock. The same key may stand in several segments (two writers at once): any of them is right.
    """

    root: Storage
    model_digest: str
    numerics: Numerics
    partition: Storage = field(init=False)

    def __post_init__(self) -> None:
        name = f"{self.model_digest[:16]}-{digest(self.numerics.tag())[:12]}"
        object.__setattr__(self, "partition", self.root.child(name))

    def key(self, prompt_ids: Sequence[int] | np.ndarray, completion_ids: Sequence[int] | np.ndarray) -> bytes:
        """Compute the key (16 bytes) of a completion: model, numerics and exact token ids."""
        identity = f"{self.model_digest} {json.dumps(self.numerics.tag(), sort_keys=True)}".encode()
        h = hashlib.blake2b(identity, digest_size=16)
        for ids in (prompt_ids, completion_ids):
            h.update(len(ids).to_bytes(4, "little"))
            h.update(np.asarray(ids, np.int32).tobytes())
        return h.digest()

    def segments(self) -> list[str]:
        """List the committed segments."""
        names = self.partition.list_files()
        return [n for n in names if n.startswith(_SEGMENT_PREFIX) and n.endswith(".parquet")]

    def index(self) -> StoreIndex:
        """Read the keys of all segments."""
        index = StoreIndex(self.partition)
        index.add_segments(self.segments())
        return index

    def append(self, keys: Sequence[bytes], token_logps: Sequence[np.ndarray]) -> str:
        """Commit a segment, durably; returns its name.

        Raises:
            ArtifactError: a value is not finite or is above 0: not a log-prob, and never to be stored.
        """
        for logps in token_logps:
            if not (np.isfinite(logps).all() and (logps <= 1e-4).all()):
                raise ArtifactError(
                    "an engine returned values that are no log-probs",
                    where=self.partition.uri,
                    fix="run again; if it stays so, set reference.engine=trainer and report it",
                )
        table = pa.table({"key": list(keys), "token_logps": list(token_logps)}, schema=SEGMENT)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        if not self.partition.exists("about.json"):
            about = {"model_digest": self.model_digest, "numerics": self.numerics.tag()}
            self.partition.write("about.json", json.dumps(about, indent=1).encode())
        name = f"{_SEGMENT_PREFIX}{uuid.uuid4().hex}.parquet"
        self.partition.write(name, sink.getvalue(), rows=len(table))
        return name


class StoreIndex:
    """Where each key's values lie. Holds keys only; values are read by segment when they are asked for."""

    def __init__(self, partition: Storage) -> None:
        self._partition = partition
        self._place: dict[bytes, tuple[str, int]] = {}
        self._known: set[str] = set()

    def add_segments(self, names: Iterable[str]) -> None:
        """Read the keys of segments that are not known yet. An unreadable one is passed over: its keys are scored again."""
        for name in names:
            if name not in self._known:
                self._known.add(name)
                try:
                    keys = self._read(name, ["key"])["key"].to_pylist()
                except ArtifactError as error:
                    logger.warning("%s", error)
                    continue
                self._place.update((key, (name, row)) for row, key in enumerate(keys))

    def add(self, name: str, keys: Sequence[bytes]) -> None:
        """Take in a segment that the caller has just written."""
        self._known.add(name)
        self._place.update((key, (name, row)) for row, key in enumerate(keys))

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def fetch(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Return float32 [completion tokens] for each key.

        Raises:
            ArtifactError: a key is not in the store, or its segment is damaged.
        """
        by_segment: dict[str, list[tuple[bytes, int]]] = {}
        for key in keys:
            if key not in self._place:
                raise ArtifactError(
                    f"no log-probs for the key {key.hex()}",
                    where=self._partition.uri,
                    fix="run again: what is missing is scored",
                )
            name, row = self._place[key]
            by_segment.setdefault(name, []).append((key, row))
        found: dict[bytes, np.ndarray] = {}
        for name, wanted in by_segment.items():
            values = self._read(name, ["token_logps"])["token_logps"].combine_chunks()
            for key, row in wanted:
                found[key] = values[row].values.to_numpy(zero_copy_only=False).astype(np.float32)
        return found

    def _read(self, name: str, columns: list[str]) -> pa.Table:
        try:
            with self._partition.open_input(name) as stream:
                file = pq.ParquetFile(stream, page_checksum_verification=True)
                if not file.schema_arrow.equals(SEGMENT):
                    raise ValueError(f"its columns are {file.schema_arrow.names}")
                return file.read(columns=columns)
        except (ValueError, OSError) as error:
            raise ArtifactError(
                f"a segment of the reference store is damaged: {str(error).splitlines()[0]}",
                where=self._partition.full_path(name),
                fix="delete that file and run again: what is missing is scored",
            ) from error
