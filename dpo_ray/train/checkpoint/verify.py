"""Verification of checkpoints. Each rank verifies some of the files, and all ranks get the same result."""

from __future__ import annotations

import logging
from typing import Any

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError, InfrastructureError

from .hashing import digest
from .manifest import UNSOUND, committed_steps, read_manifest, reason_of, set_aside, step_name
from .ranks import Ranks
from .reader import read_metadata

logger = logging.getLogger(__name__)


class Soundness:
    """Verifies checkpoints before they are loaded. Each checkpoint is verified only once.

    All ranks must construct this object together, and must call each of its methods together.
    """

    def __init__(self, place: Storage, identity: str, ranks: Ranks) -> None:
        """Prepare the verification of the checkpoints in `place`.

        Args:
            identity: digest of the configuration. A checkpoint with another digest is treated as damaged.
        """
        self._place, self._identity, self._ranks = place, identity, ranks
        self._verdicts: dict[int, dict[str, Any] | ArtifactError] = {}

    def newest(self) -> dict[str, Any] | None:
        """Return the manifest of the newest intact checkpoint; None if there is no intact checkpoint.

        Damaged checkpoints that are newer are moved to `damaged/`.

        Raises:
            InfrastructureError: some rank cannot read a file that rank 0 can read. All ranks raise this error, and
                the checkpoint is not moved.
        """
        for step in self._ranks.first_does(lambda: committed_steps(self._place)[::-1]):
            verdict = self._verdict(step)
            if not isinstance(verdict, ArtifactError):
                return verdict
            self._ranks.first_does(lambda step=step, error=verdict: self._set_aside(step, error))
        return None

    def read(self, step: int) -> dict[str, Any]:
        """Verify a step's checkpoint, and the best checkpoint that its manifest names; return the manifest.

        All ranks raise the same error.

        Raises:
            ArtifactError: one of the two checkpoints is damaged or belongs to another configuration.
            InfrastructureError: some rank cannot read a file that rank 0 can read.
        """
        verdict = self._verdict(step)
        if isinstance(verdict, ArtifactError):
            raise verdict
        return verdict

    def _verdict(self, step: int) -> dict[str, Any] | ArtifactError:
        if step not in self._verdicts:
            self._verdicts[step] = self._judged(step)
        return self._verdicts[step]

    def _judged(self, step: int) -> dict[str, Any] | ArtifactError:
        try:
            manifest = self._ranks.first_does(lambda: read_manifest(self._place, step, self._identity))
            self._verify_files(manifest)
            directory, files = self._place.child(manifest["directory"]), dict(manifest["files"])
            self._ranks.first_does(lambda: _check_metadata(directory, files))
            best = manifest["best"]
            if best is not None and best["step"] != step:
                self.read(best["step"])
        except UNSOUND as error:  # raised on all ranks
            where, fix = (
                self._place.full_path(f"{step_name(step)}.json"),
                "run the same command again: it resumes from the previous checkpoint",
            )
            return ArtifactError(reason_of(error), where=where, fix=fix)
        return manifest

    def _verify_files(self, manifest: dict[str, Any]) -> None:
        directory, files = self._place.child(manifest["directory"]), dict(manifest["files"])
        share = sorted(files)[self._ranks.rank :: self._ranks.count]
        suspect = next((name for name in share if _is_suspect(directory, name, files[name])), None)
        suspects = self._ranks.gathered(suspect)
        fault = self._ranks.first_does(lambda: _confirmed(directory, files, suspects))
        if fault is not None:
            raise ArtifactError(fault)

    def _set_aside(self, step: int, error: ArtifactError) -> None:
        what, where = error.what, error.where
        logger.warning("checkpoint %s is damaged (%s): it is moved to damaged/; the previous one is used", where, what)
        set_aside(self._place, step_name(step), what)


def _confirmed(directory: Storage, files: dict[str, str], suspects: list[str | None]) -> str | None:
    """Check again, on rank 0, the files that some rank found damaged.

    Return what is wrong with the first damaged file; None if no rank found a damaged file. Without this second check, a
    single node with a faulty mount would cause every checkpoint to be rejected.

    Args:
        files: digest of each file, by name.
        suspects: for each rank, the name of the first file that this rank found damaged, or None.

    Raises:
        InfrastructureError: some rank found a damaged file, but rank 0 finds nothing wrong with that file.
    """
    rank_of = {name: rank for rank, name in enumerate(suspects) if name is not None}
    for name in rank_of:
        if (fault := _fault(directory, name, files[name])) is not None:
            return fault
    for name, rank in rank_of.items():
        fix = (
            f"check the storage on the node of rank {rank}, then run the same command again; the checkpoints are intact"
        )
        raise InfrastructureError(
            f"rank {rank} cannot read a checkpoint file that rank 0 can read", where=directory.full_path(name), fix=fix
        )
    return None


def _check_metadata(directory: Storage, digests: dict[str, str]) -> None:
    """Raise ArtifactError if the metadata cannot be loaded, for example if both manifest and metadata were forged."""
    read_metadata(directory, digests)


def _is_suspect(directory: Storage, name: str, known: str) -> bool:
    try:
        return _fault(directory, name, known) is not None
    except InfrastructureError:  # if rank 0 has the same problem, it raises this error when it checks the file again
        return True


def _fault(directory: Storage, name: str, known: str) -> str | None:
    try:
        if directory.exists(name) and digest(directory, name) == known:
            return None
    except UNSOUND as error:
        return reason_of(error)
    return f"{name} is not what was written"
