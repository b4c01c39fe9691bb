"""Training checkpoints: sharded files by PyTorch DCP, committed by a manifest with their digests.

    <place>/step-000000010/<attempt>/__0_0.distcp, ..., .metadata
    <place>/step-000000010.json                      the commit
    <place>/metrics/000000000-000000010.jsonl        what the steps since the last checkpoint measured

The newest checkpoint that verifies wins; a damaged one is set aside. Loading reshards, so the number of ranks may change.
DCP's `.metadata` is a pickle, which runs code when it is read: only files whose digests we wrote are ever loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError

logger = logging.getLogger(__name__)
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # of an adapter, its parameters alone
_PREFIX, _CHUNK_BYTES = "step-", 1 << 22


@dataclass(frozen=True)
class Progress:
    """What a checkpoint says besides weights and optimizer state: the data cursor and running totals."""

    step: int = 0  # steps done == index of the next step
    num_tokens: int = 0
    figures: dict[str, Any] | None = None  # of the audit before step 1


def oldest_step(place: Storage) -> int:
    """Return the step of the oldest checkpoint that is kept, which training may have to go on from; 0 without any."""
    steps = [name.removeprefix(_PREFIX).removesuffix(".json") for name in place.list_files() if _is_commit(name)]
    return min(map(int, steps), default=0)


class Checkpoints:
    """The checkpoints of one training run. Every rank makes one; save and load are collective."""

    def __init__(self, place: Storage, attempt: str, keep: int) -> None:
        self._place, self._attempt, self._keep = place, attempt, keep
        self._rank = dist.get_rank() if dist.is_initialized() else 0

    def save(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, metrics: list[dict[str, float]]
    ) -> None:
        """Commit a checkpoint of all ranks, then delete those that are no longer needed.

        `metrics` are the rows of the steps since the last checkpoint, or since the one that was loaded.
        """
        name = f"{_PREFIX}{progress.step:09d}"
        directory = self._place.child(name, self._attempt)
        model_state, optimizer_state = get_state_dict(policy, optimizer, options=TRAINED)
        state_dict_saver.save({"policy": model_state, "optimizer": optimizer_state}, storage_writer=_writer(directory))
        _barrier()
        if self._rank == 0:
            self._commit(name, directory, progress, metrics)
            self._prune()
        _barrier()

    def _commit(self, name: str, directory: Storage, progress: Progress, metrics: list[dict[str, float]]) -> None:
        if metrics:
            first = int(metrics[0]["step"]) - 1
            lines = "".join(json.dumps(row) + "\n" for row in metrics)
            self._place.write(f"metrics/{first:09d}-{progress.step:09d}.jsonl", lines.encode())
        manifest = {
            "step": progress.step,
            "num_tokens": progress.num_tokens,
            "figures": progress.figures,
            "directory": f"{name}/{self._attempt}",
            "files": {n: _digest(directory, n) for n in directory.list_files()},
        }
        manifest["digest"] = _manifest_digest(manifest)
        self._place.write(f"{name}.json", json.dumps(manifest, indent=1).encode())

    def load_newest(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Restore the newest checkpoint that verifies; without one, say so by step 0."""
        chosen: list[dict[str, Any] | None] = [self._newest_sound() if self._rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen, src=0)
        manifest = chosen[0]
        if self._rank == 0:
            self._forget_metrics_after(manifest["step"] if manifest else 0)
        if manifest is None:
            return Progress()
        model_state, optimizer_state = get_state_dict(policy, optimizer, options=TRAINED)
        state = {"policy": model_state, "optimizer": optimizer_state}
        state_dict_loader.load(state, storage_reader=_reader(self._place.child(manifest["directory"])))
        set_state_dict(
            policy, optimizer, model_state_dict=state["policy"], optim_state_dict=state["optimizer"], options=TRAINED
        )
        return Progress(manifest["step"], manifest["num_tokens"], manifest["figures"])

    def metrics(self, until_step: int) -> list[dict[str, float]]:
        """Return what the steps up to a committed checkpoint measured, in order, each step once."""
        rows: dict[int, dict[str, float]] = {}
        for start, stop in self._segments():
            if stop <= until_step:
                for line in self._place.read_bytes(f"metrics/{start:09d}-{stop:09d}.jsonl").splitlines():
                    row = json.loads(line)
                    rows[row["step"]] = row
        return [rows[step] for step in sorted(rows)]

    def _forget_metrics_after(self, step: int) -> None:
        """Delete what steps measured that no sound checkpoint holds: they are done again, perhaps cut otherwise."""
        for start, stop in self._segments():
            if stop > step:
                self._place.delete(f"metrics/{start:09d}-{stop:09d}.jsonl")

    def _segments(self) -> list[tuple[int, int]]:
        names = [n.removeprefix("metrics/").removesuffix(".jsonl") for n in self._place.list_files("metrics")]
        return sorted((int(a), int(b)) for a, b in (n.split("-") for n in names))

    def _committed(self) -> list[str]:
        return [name for name in self._place.list_files() if _is_commit(name)]

    def _newest_sound(self) -> dict[str, Any] | None:
        for name in reversed(self._committed()):
            try:
                manifest = json.loads(self._place.read_bytes(name))
                if manifest.pop("digest") != _manifest_digest(manifest):
                    raise ValueError("its digest does not match its content")
                directory = self._place.child(manifest["directory"])
                wrong = [
                    n
                    for n, known in manifest["files"].items()
                    if not directory.exists(n) or _digest(directory, n) != known
                ]
                if not wrong:
                    return manifest
                reason = f"{wrong[0]} is not what was written"
            except (ValueError, KeyError, TypeError, AttributeError, ArtifactError) as error:
                reason = f"its manifest is not what was written: {error!r}"
            logger.warning(
                "checkpoint %s is damaged (%s): set aside; the one before it is used",
                self._place.full_path(name),
                reason,
            )
            self._place.write(f"damaged/{name}", self._place.read_bytes(name))
            self._place.delete(name)
        return None

    def _prune(self) -> None:
        """Delete what is older than the kept checkpoints; never what is newer, which another attempt may be writing."""
        committed = self._committed()
        for name in committed[: -self._keep]:
            self._place.delete(name)
        oldest = committed[-self._keep :][0].removesuffix(".json")
        for directory in self._place.list_dirs():
            if directory.startswith(_PREFIX) and directory < oldest:  # step numbers are padded: names sort as they do
                self._place.delete_tree(directory)


def _is_commit(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(".json") and "/" not in name


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest(directory: Storage, name: str) -> str:
    h = hashlib.sha256()
    with directory.open_input(name) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            h.update(chunk)
    return h.hexdigest()


def _writer(directory: Storage) -> StorageWriter:
    if directory.is_local:
        return FileSystemWriter(directory.local_path(), sync_files=True)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter  # torch's own; not exported yet

    return FsspecWriter(directory.uri)


def _reader(directory: Storage) -> StorageReader:
    if directory.is_local:
        return FileSystemReader(directory.local_path())
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(directory.uri)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
