"""Training checkpoints: sharded files by PyTorch DCP, written while training goes on, committed by a manifest.

    <place>/step-000000010/<attempt>/__0_0.distcp, ..., .metadata, rng.json
    <place>/step-000000010.json                      the commit
    <place>/metrics/000000000-000000010.jsonl        what the steps since the last checkpoint measured

Each rank hashes what it wrote, and verifies a share of all files before they are loaded. The newest checkpoint that
verifies wins; a damaged one is set aside. Loading reshards, so the number of ranks may change.
DCP's `.metadata` is a pickle, which runs code when it is read: only files whose digests we wrote are ever loaded.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import StorageReader

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError
from dpo_ray.train.rng import rng_state, seed_rank, set_rng_state

from .hashing import HashingWriter, hashing_writer
from .manifest import commit, committed_steps, prune, step_name
from .planner import SharedPlanner
from .ranks import Ranks
from .verify import Soundness

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # of an adapter, its parameters alone
_RNG = "rng.json"


@dataclass(frozen=True)
class Best:
    """The evaluation that was best so far, whose checkpoint is kept."""

    step: int
    value: float
    since: int = 0  # evaluations after it, none of them better


@dataclass(frozen=True)
class Progress:
    """What a checkpoint says besides weights, optimizer state and random generators: the data cursor and running totals."""

    step: int = 0  # steps done == index of the next step
    num_tokens: int = 0
    figures: dict[str, Any] | None = None  # of the audit before step 1
    best: Best | None = None


def oldest_step(place: Storage) -> int:
    """Return the step of the oldest checkpoint that is kept, which training may have to go on from; 0 without any."""
    return min(committed_steps(place), default=0)


class Checkpoints:
    """The checkpoints of one training run. Every rank makes one, at the same time; save, finish and load are collective."""

    def __init__(
        self,
        place: Storage,
        attempt: str,
        keep: int,
        identity: str = "",
        seed: int = 0,
        hang_seconds: float = 1800,
    ) -> None:
        """Write to `place` as `attempt`, and keep the newest `keep`.

        Args:
            identity: of what determines the weights; a checkpoint of another identity is not loaded.
            seed: of the random generators where a checkpoint is of another number of ranks.
            hang_seconds: most that one rank waits for another.
        """
        self._place, self._attempt, self._keep = place, attempt, keep
        self._identity, self._seed = identity, seed
        self._ranks = Ranks(hang_seconds)
        self._plans = uuid4().hex  # whose plans those of its saves are
        cuda = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
        )
        self._stager = DefaultStager(options)
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-commit")
        self._in_flight: Future[Any] | None = None

    def save(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, metrics: list[dict[str, float]]
    ) -> None:
        """Copy the state of all ranks; write and commit it while training goes on, once the one before is committed.

        `metrics` are the rows of the steps since the last checkpoint, or since the one that was loaded.

        Raises:
            ArtifactError: the one before could not be written.
        """
        self._wait()
        model_state, optimizer_state = get_state_dict(policy, optimizer, options=TRAINED)
        generators = self._ranks.gathered(rng_state())
        directory = f"{step_name(progress.step)}/{self._attempt}"
        writer = hashing_writer(self._place.child(directory))
        written = state_dict_saver.async_save(
            {"policy": model_state, "optimizer": optimizer_state},
            storage_writer=writer,
            planner=SharedPlanner(self._plans),
            process_group=self._ranks.group,
            async_stager=self._stager,
        )
        if not isinstance(written, Future):
            raise TypeError(f"a stager that copies at once gives a future, not {type(written).__name__}")
        if self._ranks.rank:
            self._in_flight = written
        else:  # rank 0's write ends when all ranks' have: DCP's coordinator gathers their results, digests among them
            self._in_flight = self._committer.submit(
                self._commit, written, writer, directory, generators, progress, metrics
            )

    def _commit(
        self,
        written: Future[Any],
        writer: HashingWriter,
        directory: str,
        generators: list[Any],
        progress: Progress,
        metrics: list[dict[str, float]],
    ) -> None:
        written.result()
        self._place.child(directory).write(_RNG, json.dumps(generators).encode())
        if metrics:
            first = int(metrics[0]["step"]) - 1
            lines = "".join(json.dumps(row) + "\n" for row in metrics)
            self._place.write(f"metrics/{first:09d}-{progress.step:09d}.jsonl", lines.encode())
        commit(self._place, directory, asdict(progress) | {"identity": self._identity}, writer.digests)
        prune(self._place, self._keep)

    def check(self) -> None:
        """Raise what went wrong with a checkpoint in flight, if that is known by now. Costs nothing; not collective."""
        if self._in_flight is not None and self._in_flight.done():
            self._wait()

    def finish(self) -> None:
        """Wait until no checkpoint is in flight and all are committed; collective."""
        self._wait()
        self._ranks.meet()

    def _wait(self) -> None:
        written, self._in_flight = self._in_flight, None
        if written is None:
            return
        try:
            written.result()
        except (CheckpointException, RuntimeError, OSError) as error:
            place, fix = self._place.uri, "mend the storage; training goes on from the checkpoint before"
            raise ArtifactError(f"a checkpoint could not be written: {error}", where=place, fix=fix) from error

    def load_newest(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Restore the newest checkpoint that verifies; without one, say so by step 0.

        The random generators go on where they were; where the number of ranks is another, they are seeded by seed, rank
        and step.
        """
        manifest = Soundness(self._place, self._identity, self._ranks).newest()
        if self._ranks.rank == 0:
            self._forget_metrics_after(manifest["step"] if manifest else 0)
        if manifest is None:
            return Progress()
        self._restore(policy, optimizer, manifest)
        generators = json.loads(self._place.child(manifest["directory"]).read_bytes(_RNG))
        if len(generators) == self._ranks.count:
            set_rng_state(generators[self._ranks.rank])
        else:
            seed_rank(self._seed, self._ranks.rank, manifest["step"])
        best = Best(**manifest["best"]) if manifest["best"] else None
        return Progress(manifest["step"], manifest["num_tokens"], manifest["figures"], best)

    def load(self, policy: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Restore weights and optimizer state of the checkpoint of a step; collective.

        Raises:
            ArtifactError: on every rank, if it does not verify. `load_newest` then goes back to before it.
        """
        self._restore(policy, optimizer, Soundness(self._place, self._identity, self._ranks).read(step))

    def _restore(self, policy: nn.Module, optimizer: torch.optim.Optimizer, manifest: dict[str, Any]) -> None:
        model_state, optimizer_state = get_state_dict(policy, optimizer, options=TRAINED)
        state = {"policy": model_state, "optimizer": optimizer_state}
        directory = self._place.child(manifest["directory"])
        try:
            state_dict_loader.load(state, storage_reader=_reader(directory), process_group=self._ranks.group)
        except CheckpointException as error:  # a BaseException, which not everybody catches
            fix = "mend the storage; the files were what was written when they were verified"
            raise ArtifactError(f"a checkpoint could not be read: {error}", where=directory.uri, fix=fix) from error
        set_state_dict(
            policy, optimizer, model_state_dict=state["policy"], optim_state_dict=state["optimizer"], options=TRAINED
        )

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


def _reader(directory: Storage) -> StorageReader:
    if directory.is_local:
        return FileSystemReader(directory.local_path())
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(directory.uri)
