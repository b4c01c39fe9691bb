"""Run the real code of the stage `schedule` on made-up groups, each piece small enough for seconds: order, dealing, packing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry, Manifest, manifest_bytes, parse_manifest
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.artifacts.tables import parquet_bytes
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.schemas import TOKENS
from dpo_ray.schedule.buckets import Bucket, deal_rows
from dpo_ray.schedule.build import Packing, write_bucket
from dpo_ray.schedule.files import file_name
from dpo_ray.schedule.stage import order_splits

ORDER_PART_ROWS = 65_536  # larger than a real part, so that writing the input takes no time worth naming


def write_ids(groups: int, place: Path) -> Artifact:
    """Commit a tokens artifact of pairs with random ids and no tokens: all that the order reads."""
    staging = ArtifactStore(Storage(place)).begin("prepare", f"ids_{groups}", "scale")
    rng, entries = np.random.default_rng(0), []
    for first in range(0, groups, ORDER_PART_ROWS):
        rows = min(ORDER_PART_ROWS, groups - first)
        ids = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(rng.bytes(16 * rows))])
        table = pa.table(
            {
                "group_id": ids,
                "scores": _lists(np.tile(np.array([1, 0], np.float32), rows), 2),
                "chosen": _lists(np.zeros(rows, np.int16), 1),
            }
        )
        entries.append(staging.write(f"train/{first:012d}.parquet", parquet_bytes(table), rows=rows))
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows={"train/admitted": groups}, figures={})


def ordering(groups: int, groups_per_step: int, place: Path) -> Callable[[], int]:
    """Prepare `order_splits` of so many groups; it returns the steps."""
    tokens, train = write_ids(groups, place), TrainConfig(groups_per_step=groups_per_step)
    return lambda: len(order_splits(tokens, train, seed=0)[0].steps)


def token_table(lengths: np.ndarray) -> pa.Table:
    """Make rows of schema TOKENS, with log-probs as the reference has them, of random ids: int64 [groups, 3] tokens."""
    rng, rows = np.random.default_rng(0), len(lengths)
    prompts, completions = lengths[:, 0], lengths[:, 1:].ravel()

    def lists(sizes: np.ndarray, values: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(sizes)).astype(np.int32)), pa.array(values))

    def ids(sizes: np.ndarray) -> pa.ListArray:
        return lists(sizes, rng.integers(0, 32_000, sizes.sum(), np.int32))

    logps = lists(completions, -rng.random(completions.sum(), np.float32))
    columns = {
        "group_id": pa.array([rng.bytes(16) for _ in range(rows)], pa.binary(16)),
        "source": pa.array(["made"] * rows),
        "prompt_ids": ids(prompts),
        "completion_ids": lists(np.full(rows, 2), ids(completions)),
        "scores": _lists(np.tile(np.array([1, 0], np.float32), rows), 2),
        "chosen": _lists(np.zeros(rows, np.int16), 1),
        "rejected": _lists(np.ones(rows, np.int16), 1),
        "preference_probability": pa.array(np.ones(rows, np.float32)),
        "weight": pa.array(np.ones(rows, np.float32)),
    }
    return pa.table(columns, schema=TOKENS).append_column("token_logps", lists(np.full(rows, 2), logps))


def dealing(lengths: np.ndarray, buckets: int, times: int, place: Path) -> Callable[[], float]:
    """Prepare `deal_rows` of a table in memory to as many buckets, so many times; it returns the bytes on disk beyond those
    of the rows, of all files of one time.
    """
    table = token_table(lengths)
    rows = np.random.default_rng(0).permutation(len(table))
    wanted = [Bucket("train", i, [share.tolist()]) for i, share in enumerate(np.array_split(rows, buckets))]

    def deal() -> float:
        files = [file for _ in range(times) for file in deal_rows([lambda: table], wanted, place)]
        return sum(file.stat().st_size for file in files) / times - table.nbytes

    return deal


def packing(lengths: np.ndarray, steps: int, ranks: int, place: Path) -> Callable[[], int]:
    """Prepare `write_bucket` of a bucket of so many steps; it returns the bytes on disk."""
    rows = np.arange(len(lengths))
    table = token_table(lengths).append_column("row", pa.array(rows))
    bucket = Bucket("train", 0, rows.reshape(steps, -1).tolist())
    staging = ArtifactStore(Storage(place)).begin("schedule", f"ranks_{ranks}_{steps}_{len(lengths)}", "scale")
    shape = Packing(ranks, tokens_per_micro_batch=8192)
    return lambda: sum(entry.bytes for entry in write_bucket(bucket, table, shape, staging))


def manifest_reading(files: int) -> Callable[[], int]:
    """Prepare the reading of a schedule's manifest of so many files, as each training worker has it; it returns its bytes."""
    data = manifest_bytes(
        Manifest(
            stage="schedule",
            stage_version=1,
            key="0" * 16,
            run="scale",
            attempt="0" * 16,
            created_unix_seconds=0.0,
            seconds=0.0,
            files=tuple(_entries(files)),
            rows={},
            inputs={},
            config={},
            figures={},
            versions={},
        )
    )
    held = []  # what is read stays in memory, as with a worker

    def read() -> int:
        held.append(parse_manifest(data, "scale"))
        return len(data)

    return read


def _entries(files: int) -> Iterator[FileEntry]:
    for i in range(files):
        name = file_name("train", i % 4096, 128 * (i // 4096))
        yield FileEntry(name=name, path=name, bytes=1 << 20, sha256="0" * 64, rows=128)


def _lists(values: Any, size: int) -> pa.ListArray:
    offsets = np.arange(0, len(values) + 1, size, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
