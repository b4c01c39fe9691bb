"""What a training checkpoint of a large model comes to: bytes, files, and the time until it is committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STATE_BYTES = 12  # of a parameter: float32 master weight, AdamW's two moments
STATES = 3  # tensors of the checkpoint for each of the model
GPUS_PER_NODE = 8

# Assumed, not measured.
COPY_BYTES_PER_SECOND = 20e9  # from a GPU to pinned memory of its host
NODE_BYTES_PER_SECOND = 2e9  # between a node and the storage, either way
STORAGE_BYTES_PER_SECOND = 200e9  # of all nodes together
START_SECONDS = 180.0  # a failure seen, a node replaced, processes, Ray Train, NCCL and the model up again


@dataclass(frozen=True)
class Model:
    """A model that is trained whole."""

    name: str
    parameters: float
    tensors: int
    layout_shards: int  # train.sharding.shard_workers where it is hybrid

    @property
    def state_bytes(self) -> float:
        return self.parameters * STATE_BYTES


LLAMA_7B = Model("7B", 6.74e9, 32 * 9 + 3, 8)
LLAMA_70B = Model("70B", 68.98e9, 80 * 9 + 3, 64)


@dataclass(frozen=True)
class Measured:
    """What this machine took for parts of a commit."""

    plan_seconds: float  # of an item: DCP's global plan, on rank 0
    metadata_bytes: float  # of an item, in `.metadata`
    metadata_seconds: float  # of an item, to write it there
    digest_bytes_per_second: float  # of one rank, files in the page cache


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of a model on so many ranks, sharded over all of them or `hybrid`."""

    model: Model
    ranks: int
    hybrid: bool
    measured: Measured

    @property
    def shards(self) -> int:
        return min(self.ranks, self.model.layout_shards) if self.hybrid else self.ranks

    @property
    def rank_bytes(self) -> float:
        """Return the bytes of the state that a rank holds, and copies to its host."""
        return self.model.state_bytes / self.shards

    @property
    def files(self) -> int:
        """Count a file for each rank that writes shards, one for each rank's generators, and `.metadata`.

        Of equal shards one rank writes one.
        """
        return min(self.ranks, self.written_items) + self.ranks + 1

    @property
    def plan_items(self) -> int:
        """Count what rank 0 plans: each rank's part of each tensor, copies of a shard too."""
        return self.ranks * self.model.tensors * STATES

    @property
    def written_items(self) -> int:
        """Count the parts of tensors that are written, each once."""
        return self.shards * self.model.tensors * STATES

    @property
    def metadata_bytes(self) -> float:
        return self.written_items * self.measured.metadata_bytes

    @property
    def metadata_seconds(self) -> float:
        return self.written_items * self.measured.metadata_seconds

    @property
    def copy_seconds(self) -> float:
        """Return the seconds for which training stands still."""
        return self.rank_bytes / COPY_BYTES_PER_SECOND

    @property
    def plan_seconds(self) -> float:
        """Return the seconds in which rank 0 plans. It plans once after a start, because the next saves have the same plan."""
        return self.plan_items * self.measured.plan_seconds

    @property
    def write_seconds(self) -> float:
        return self.model.state_bytes / self._bytes_per_second

    @property
    def digest_seconds(self) -> float:
        """Return the seconds in which each rank reads and hashes its share of the files, to commit and before a restore."""
        together = min(self.ranks * self.measured.digest_bytes_per_second, self._bytes_per_second)
        return self.model.state_bytes / together + self.metadata_bytes / self.measured.digest_bytes_per_second

    @property
    def commit_seconds(self) -> float:
        """Return the seconds from the copy to the commit, while training continues; not for the first checkpoint after a start."""
        return self.write_seconds + self.digest_seconds + self.metadata_seconds

    @property
    def restart_seconds(self) -> float:
        """Return the seconds from a failure to the next step: start, verification, reading."""
        read_bytes = self.rank_bytes * self.ranks  # every copy of a shard is read
        return START_SECONDS + self.digest_seconds + read_bytes / self._bytes_per_second

    @property
    def _bytes_per_second(self) -> float:
        """Return the bytes per second that all nodes together exchange with the storage."""
        return min(-(-self.ranks // GPUS_PER_NODE) * NODE_BYTES_PER_SECOND, STORAGE_BYTES_PER_SECOND)


def planning(ranks: int, tensors: int) -> Callable[[], int]:
    """Prepare DCP's global plan of so many ranks and tensors; it returns the items."""
    from torch import Size
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    def item(tensor: int, rank: int) -> WriteItem:
        offset, size = Size([16 * rank, 0]), Size([16, 4096])
        index = MetadataIndex(f"policy.model.layers.{tensor}.self_attn.q_proj.weight", offset)
        data = TensorWriteData(ChunkStorageMetadata(offset, size), TensorProperties(), Size([16 * ranks, 4096]))
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    plans = [SavePlan([item(tensor, rank) for tensor in range(tensors)], planner_data={}) for rank in range(ranks)]
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    return lambda: sum(len(plan.items) for plan in planner.create_global_plan(plans)[0])


def metadata_writing(ranks: int, tensors: int, place: Path) -> Callable[[], int]:
    """Prepare the writing of `.metadata` for so many ranks and tensors; it returns its bytes."""
    from torch import Size
    from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        STORAGE_TYPES,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.storage import WriteResult

    offsets, size = [Size([16 * rank, 0]) for rank in range(ranks)], Size([16, 4096])
    names = [f"policy.model.layers.{tensor}.self_attn.q_proj.weight" for tensor in range(tensors)]
    known: dict[str, STORAGE_TYPES] = {
        name: TensorStorageMetadata(
            TensorProperties(), Size([16 * ranks, 4096]), [ChunkStorageMetadata(o, size) for o in offsets]
        )
        for name in names
    }
    results = [
        [
            WriteResult(MetadataIndex(name, o, rank), 1 << 18, _StorageInfo(f"__{rank}_0.distcp", i << 18, 1 << 18))
            for i, name in enumerate(names)
        ]
        for rank, o in enumerate(offsets)
    ]

    def write() -> int:
        FileSystemWriter(place).finish(Metadata(known), results)
        return (place / ".metadata").stat().st_size

    return write


def committing(size_bytes: int, place: Path) -> Callable[[], None]:
    """Prepare the project's `commit` of one file of so many bytes, which it hashes as every rank does its own."""
    from dpo_ray.artifacts.storage import Storage
    from dpo_ray.train.checkpoint.manifest import commit, step_name

    storage, directory = Storage(place), f"{step_name(1)}/attempt"
    storage.child(directory).write("__0_0.distcp", bytes(size_bytes))
    return lambda: commit(storage, directory, {"step": 1}, {})
