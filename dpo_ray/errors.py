"""The errors that a user sees. Each error has an exit code, and says what is wrong, where, and how to fix it."""

from __future__ import annotations


class DpoRayError(Exception):
    """The base class of all errors that a user sees: what is wrong, where it was found, and how to fix it.

    `exit_code` is what the command line returns; the codes are documented in docs/operations.md. `is_final` tells whether
    the same recipe would end with the same error on other machines, too, so that a retry on a new cluster cannot help.
    """

    exit_code = 1
    is_final = False

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)  # all three in `args`, so that the error survives pickling by Ray
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.where, self.fix)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  -> {self.fix}" if self.fix else text


def _rebuild(cls: type[DpoRayError], what: str, where: str, fix: str) -> DpoRayError:
    return cls(what, where=where, fix=fix)


class ConfigError(DpoRayError):
    """A recipe or a command-line value is wrong. Nothing was started."""

    exit_code = 2
    is_final = True


class DataError(DpoRayError):
    """The input data cannot be used; for example, no row is usable, or too many rows are invalid."""

    exit_code = 3
    is_final = True


class ArtifactError(DpoRayError):
    """A committed artifact is missing or damaged, or cannot be written."""

    exit_code = 4


class WriteRefusedError(ArtifactError):
    """A disk refuses to write: it is full or read-only, or the user has no permission. Only a person can solve this."""

    is_final = True


class LeaseError(DpoRayError):
    """Another driver is already working on this run."""

    exit_code = 5


class AuditError(DpoRayError):
    """The stored log-probs of the reference model differ too much from the log-probs that the trainer computes."""

    exit_code = 6
    is_final = True


class TrainError(DpoRayError):
    """Training stopped because a loss or a gradient was not finite, or because the workers failed too often."""

    exit_code = 7
    is_final = True


class WorkersLostError(TrainError):
    """The training workers failed or hung too often, for reasons that other machines may not have."""

    is_final = False


class EngineError(DpoRayError):
    """An inference engine could not start, or returned an invalid result."""

    exit_code = 8
    is_final = True


class InfrastructureError(DpoRayError):
    """Ray, the storage or a package is not available or cannot be used."""

    exit_code = 9


class SetupError(InfrastructureError):
    """What is installed or how large the machines are is not enough: a package, a library or memory is missing."""

    is_final = True


class MemoryLimitError(SetupError):
    """Workers were killed for lack of memory. The error names the machine or pod, its limit, and the field to change."""


class StorageFailedError(InfrastructureError):
    """An object store does not answer, or refuses a request. The client has already repeated the request."""


class RayLostError(InfrastructureError):
    """A process of Ray that the driver needs is lost: the process of Ray's head, or the raylet of this machine.

    `ray.shutdown` would wait for the lost process, so the driver must end without calling it.
    """


class JudgeError(DpoRayError):
    """A judge, which scores completions in online rounds, cannot work or has spent its budget."""

    exit_code = 10
    is_final = True


class JudgeLostError(JudgeError):
    """A judge does not answer now: its endpoint is away, or its processes die."""

    is_final = False


class LostSightError(DpoRayError):
    """The Kubernetes API server does not answer. A run there goes on, and how it ends is not known."""

    exit_code = 11


class StoppedError(DpoRayError):
    """Stopped by SIGTERM; the same command continues from the committed work."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


EXIT_CODES = {
    0: "Success.",
    **{
        e.exit_code: (e.__doc__ or "").splitlines()[0]
        for e in (
            ConfigError,
            DataError,
            ArtifactError,
            LeaseError,
            AuditError,
            TrainError,
            EngineError,
            InfrastructureError,
            JudgeError,
            LostSightError,
            StoppedError,
        )
    },
    130: "Stopped by Ctrl-C; the same command continues from the committed work.",
}
