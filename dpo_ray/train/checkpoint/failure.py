"""The error to raise if DCP could not write or read a checkpoint. The cause is the first failure of a rank."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException

from dpo_ray.artifacts.storage import Storage, is_refusal
from dpo_ray.errors import ArtifactError, DpoRayError, StorageFailedError, WriteRefusedError


def failed(what: str, place: Storage, error: BaseException, fix: str) -> DpoRayError:
    """Convert an error of DCP to the error to raise. The error of DCP contains the errors of all ranks that failed.

    Returns:
        The DpoRayError of a rank, if a rank raised one. Otherwise WriteRefusedError or StorageFailedError, if another
        attempt would fail in the same way. In all other cases ArtifactError.
    """
    of_ranks = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    causes = of_ranks or [error]
    if (own := next((cause for cause in causes if isinstance(cause, DpoRayError)), None)) is not None:
        return own
    refusal = next(filter(is_refusal, causes), None) if place.is_local else None
    first = refusal or causes[0]
    kind = WriteRefusedError if refusal else ArtifactError if place.is_local or not of_ranks else StorageFailedError
    return kind(f"{what}: {type(first).__name__}: {first}", where=place.uri, fix=fix)
