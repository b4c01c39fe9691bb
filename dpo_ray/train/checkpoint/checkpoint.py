"""Training checkpoints: sharded files of PyTorch DCP, written while training continues, and committed by a manifest.

    <place>/step-000000010/attempt-000002/__0_0.distcp, ..., .metadata, rng-0.json, ...
    <place>/step-000000010.json                      the commit
    <place>/claims/000002.json                       the attempt: one group of workers
    <place>/metrics/000000000-000000010.jsonl        metrics of the steps since the last checkpoint

Each rank hashes the files that it wrote, and verifies a share of all files before they are loaded. The newest intact
checkpoint is used; newer checkpoints that are damaged are moved to `damaged/`. Loading reshards the tensors, so the
number of ranks may change. If workers were replaced but still run, they write only to the directories of their attempt,
and commit nothing. Only files whose digest is in the manifest are loaded, and in a way that cannot run code
(`reader.py`).
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
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from dpo_ray.artifacts.storage import Storage
from dpo_ray.train.rng import rng_state, seed_rank, set_rng_state

from .claim import Claim
from .failure import failed
from .hashing import HashingWriter, hashing_writer
from .manifest import commit, committed_steps, prune, step_name
from .planner import SharedPlanner
from .ranks import Ranks
from .reader import Planner, Reader
from .verify import Soundness

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # if an adapter is trained, only its parameters
_RNG = "rng-{rank}.json"  # each rank reads only its own: with thousands of ranks, all states together are megabytes


@dataclass(frozen=True)
class Best:
    """The best evaluation so far. The checkpoint of its step is kept."""

    step: int
    value: float
    since: int = 0  # number of evaluations after the best one


@dataclass(frozen=True)
class Progress:
    """The position in the data and the running totals.

    A checkpoint stores this progress besides the weights, the optimizer state and the state of the random generators.
    """

    step: int = 0  # finished steps == index of the next step
    num_tokens: int = 0
    figures: dict[str, Any] | None = None  # measured by the audit before step 1
    best: Best | None = None


def oldest_step(place: Storage) -> int:
    """Return the step of the oldest checkpoint; 0 if there is none. Training never resumes before this step."""
    return min(committed_steps(place), default=0)


class Checkpoints:
    """The checkpoints of one training run.

    All ranks must construct this object together. `save`, `finish`, `load_newest` and `load` are collective: all ranks
    must call them.
    """

    def __init__(
        self,
        place: Storage,
        attempt: str,
        keep: int,
        identity: str = "",
        seed: int = 0,
        hang_seconds: float = 1800,
    ) -> None:
        """Claim `place`, so that no earlier group of workers commits there any more; keep the newest `keep` checkpoints.

        Args:
            attempt: name of this training, which is written to the claim for people who read it.
            identity: digest of everything that determines the weights. A checkpoint with another identity is not
                loaded.
            seed: seed of the random generators, used if a checkpoint was written by another number of ranks.
            hang_seconds: longest time that one rank waits for another.

        Raises:
            LeaseError: raised on every rank, because other groups of workers repeatedly claimed `place` at the same
                time.
        """
        self._place, self._keep = place, keep
        self._identity, self._seed = identity, seed
        self._ranks = Ranks(hang_seconds)
        self._claim = self._ranks.first_does(lambda: Claim(place, attempt))
        self._plans = uuid4().hex  # key of the cached DCP plans of this object
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
        """Copy the state of all ranks, then write and commit the copy in the background.

        First wait until the previous checkpoint is committed.

        `metrics` are the rows of all steps since the checkpoint that was last saved or loaded.

        Raises:
            ArtifactError, StorageFailedError: the previous checkpoint could not be written.
            LeaseError: a newer group of workers has claimed the checkpoints.
        """
        self._wait()
        model_state, optimizer_state = get_state_dict(policy, optimizer, options=TRAINED)
        directory = f"{step_name(progress.step)}/{self._claim.directory}"
        generators = {_RNG.format(rank=self._ranks.rank): json.dumps(rng_state()).encode()}
        writer = hashing_writer(self._place.child(directory), generators)
        written = state_dict_saver.async_save(
            {"policy": model_state, "optimizer": optimizer_state},
            storage_writer=writer,
            planner=SharedPlanner(self._plans),
            process_group=self._ranks.group,
            async_stager=self._stager,
        )
        if not isinstance(written, Future):
            raise TypeError(
                f"DCP returned {type(written).__name__}, not the future that it returns with a synchronous stager"
            )
        if self._ranks.rank:
            self._in_flight = written
        else:  # rank 0's write ends after those of all ranks: DCP's coordinator gathers their results and digests
            self._in_flight = self._committer.submit(self._commit, written, writer, directory, progress, metrics)

    def _commit(
        self,
        written: Future[Any],
        writer: HashingWriter,
        directory: str,
        progress: Progress,
        metrics: list[dict[str, float]],
    ) -> None:
        written.result()
        self._claim.check()
        if metrics:
            first = int(metrics[0]["step"]) - 1
            lines = "".join(json.dumps(row) + "\n" for row in metrics)
            self._place.write(f"metrics/{first:09d}-{progress.step:09d}.jsonl", lines.encode())
        commit(self._place, directory, asdict(progress) | {"identity": self._identity}, writer.digests)
        prune(self._place, self._keep, self._claim)

    def check_claim(self) -> None:
        """Raise LeaseError if a newer group of workers has claimed the checkpoints. Not collective."""
        self._claim.check()

    def check(self) -> None:
        """Raise the error of the checkpoint that is being written, if the writing has already failed.

        This method does not wait, and each rank may call it without the others.
        """
        if self._in_flight is not None and self._in_flight.done():
            self._wait()

    def finish(self) -> None:
        """Wait until all checkpoints are committed. Collective: all ranks must call this."""
        self._wait()
        self._ranks.meet()

    def _wait(self) -> None:
        written, self._in_flight = self._in_flight, None
        if written is None:
            return
        try:
            written.result()
        except (CheckpointException, RuntimeError, OSError) as error:  # the first is a BaseException
            fix = "repair the storage; training resumes from the previous checkpoint"
            raise failed("a checkpoint could not be written", self._place, error, fix) from error

    def load_newest(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Restore the newest intact checkpoint and return its progress; without a checkpoint, the initial progress.

        The random generators are restored, too, if the checkpoint has the state of exactly these ranks. Otherwise (the
        number of ranks has changed, or an earlier version wrote the checkpoint) the generators are seeded from seed,
        rank and step.
        """
        manifest = Soundness(self._place, self._identity, self._ranks).newest()
        if self._ranks.rank == 0:
            self._forget_metrics_after(manifest["step"] if manifest else 0)
        if manifest is None:
            return Progress()
        self._restore(policy, optimizer, manifest)
        own = _RNG.format(rank=self._ranks.rank)
        states = {_RNG.format(rank=rank) for rank in range(self._ranks.count)}
        if states == {name for name in manifest["files"] if name.startswith("rng-")}:
            set_rng_state(json.loads(self._place.child(manifest["directory"]).read_bytes(own)))
        else:
            seed_rank(self._seed, self._ranks.rank, manifest["step"])
        best = Best(**manifest["best"]) if manifest["best"] else None
        return Progress(manifest["step"], manifest["num_tokens"], manifest["figures"], best)

    def load(self, policy: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Load weights and optimizer state from the checkpoint of a step. Collective: all ranks must call this.

        Raises:
            ArtifactError: the checkpoint is damaged. All ranks raise this error. A later `load_newest` loads an earlier
                checkpoint.
        """
        self._restore(policy, optimizer, Soundness(self._place, self._identity, self._ranks).read(step))

    def _restore(self, policy: nn.Module, optimizer: torch.optim.Optimizer, manifest: dict[str, Any]) -> None:
        model_state, optimizer_state = get_state_dict(policy, optimizer, options=TRAINED)
        state = {"policy": model_state, "optimizer": optimizer_state}
        directory = self._place.child(manifest["directory"])
        try:
            state_dict_loader.load(
                state,
                storage_reader=Reader(directory, dict(manifest["files"])),
                planner=Planner(),
                process_group=self._ranks.group,
            )
        except CheckpointException as error:
            fix = "repair the storage; the files were intact when they were verified"
            raise failed("a checkpoint could not be read", directory, error, fix) from error
        set_state_dict(
            policy, optimizer, model_state_dict=state["policy"], optim_state_dict=state["optimizer"], options=TRAINED
        )

    def metrics(self, until_step: int) -> list[dict[str, float]]:
        """Return one row of metrics per step, in order, up to `until_step`. That step must have a checkpoint."""
        rows: dict[int, dict[str, float]] = {}
        for start, stop in self._segments():
            if stop <= until_step:
                for line in self._place.read_bytes(f"metrics/{start:09d}-{stop:09d}.jsonl").splitlines():
                    row = json.loads(line)
                    rows[row["step"]] = row
        return [rows[step] for step in sorted(rows)]

    def _forget_metrics_after(self, step: int) -> None:
        """Delete the files with metrics of steps after `step`. These steps run again, with new files of other names."""
        for start, stop in self._segments():
            if stop > step:
                self._place.delete(f"metrics/{start:09d}-{stop:09d}.jsonl")

    def _segments(self) -> list[tuple[int, int]]:
        names = [n.removeprefix("metrics/").removesuffix(".jsonl") for n in self._place.list_files("metrics")]
        return sorted((int(a), int(b)) for a, b in (n.split("-") for n in names))
