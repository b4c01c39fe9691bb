"""The files of a run on the shared volume: the logs that its attempts left, reading a file, deleting the run's directory."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dpo_ray.errors import ConfigError, InfrastructureError

from .client import Cluster
from .files_pod import RunVolume, shell

DRIVER_LOG = "driver.log"
PIECE_BYTES = 1 << 20
MISSING = 3
DELETE_SECONDS = 600.0

LIST = 'cd "$1/logs" 2>/dev/null || exit 3; find . -type f -size +0 | sort'
READ = 'test -f "$1" || exit 3; tail -c "+$(($2 + 1))" "$1" | head -c "$3"'


def logs(cluster: Cluster, volume: RunVolume, pod: str) -> dict[int, list[str]]:
    """List the files with logs that the attempts of a run have left, by the number of the attempt.

    Raises:
        ConfigError: the run has left none.
        InfrastructureError: the volume cannot be read.
    """
    done = shell(cluster, volume, pod, LIST, volume.directory)
    if done.code not in (0, MISSING):
        raise _failed(volume.directory, done.errors)
    files: dict[int, list[str]] = {}
    for line in done.output.decode(errors="replace").splitlines():
        if match := re.fullmatch(r"\./attempt-(\d+)/(.+)", line):
            files.setdefault(int(match[1]), []).append(match[2])
    if not files:
        fix = (
            "a run leaves logs as soon as its driver starts; before that, `dpo-ray kubernetes watch` says why it waits"
        )
        raise ConfigError("no attempt has left logs", where=f"{volume.directory}/logs", fix=fix)
    return dict(sorted(files.items()))


def chosen(files: dict[int, list[str]], attempt: int | None) -> int:
    """Return the number of an attempt: the given one, or the last.

    Raises:
        ConfigError: this attempt has left no logs.
    """
    number = max(files) if attempt is None else attempt
    if number not in files:
        known = ", ".join(map(str, files))
        raise ConfigError("this attempt has left no logs", where=f"--attempt {number}", fix=f"there are: {known}")
    return number


def content(cluster: Cluster, volume: RunVolume, pod: str, path: str, first: int = 0) -> Iterator[bytes]:
    """Yield the content of a file piece by piece, from the byte with the number `first` on.

    Raises:
        ConfigError: there is no such file.
        InfrastructureError: the volume cannot be read.
    """
    while True:
        done = shell(cluster, volume, pod, READ, path, str(first), str(PIECE_BYTES))
        if done.code == MISSING:
            raise ConfigError("there is no such file", where=path, fix="choose one of those that the run has left")
        if done.code != 0:
            raise _failed(path, done.errors)
        yield done.output
        first += len(done.output)
        if len(done.output) < PIECE_BYTES:
            return


def delete_directory(cluster: Cluster, volume: RunVolume, pod: str) -> None:
    """Delete the run's own directory on the volume.

    Raises:
        ConfigError: it is not a directory below the volume's.
        InfrastructureError: it cannot be deleted.
    """
    parts = volume.directory.removeprefix(f"{volume.mount}/").split("/")
    if not volume.directory.startswith(f"{volume.mount}/") or "" in parts or ".." in parts:
        raise ConfigError("this is no directory of a run", where=volume.directory, fix="delete it by hand")
    done = shell(cluster, volume, pod, 'rm -rf -- "$1"', volume.directory, seconds=DELETE_SECONDS)
    if done.code != 0:
        raise _failed(volume.directory, done.errors)


def _failed(where: str, why: str) -> InfrastructureError:
    fix = "try again; it needs the right to `create` and `get` pods/exec"
    return InfrastructureError(f"the volume cannot be used: {why}", where=where, fix=fix)
