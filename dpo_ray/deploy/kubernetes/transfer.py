"""Copying the files that a recipe names onto the volume of its pods: in pieces that are resumed, compared by SHA-256."""

from __future__ import annotations

import glob
import hashlib
import os
import posixpath
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError, InfrastructureError, WriteRefusedError
from dpo_ray.observe.text import duration, size

from .client import Cluster
from .execute import Executed
from .files_pod import RunVolume, shell
from .named_files import named_files

PIECE_BYTES = 8 << 20
TRIES = 6  # of one piece, with growing pauses, before the command ends; the next one resumes
FIRST_PAUSE_SECONDS = 1.0
HASH_SECONDS = 3600.0
PIECE_SECONDS = 300.0
TOLD_EVERY_SECONDS = 10.0
PART = ".dpo-ray-part"

STATE = 'for f in "$1" "$1$2"; do if [ -f "$f" ]; then wc -c < "$f"; else echo -1; fi; done'
HASH = 'sha256sum < "$1"'
BEGIN = 'mkdir -p "$(dirname "$1")" && : > "$1"'
APPEND = 'head -c "$2" >> "$1" && wc -c < "$1"'
COMMIT = 'mv -f "$1" "$2"'


class LocalFile(NamedTuple):
    """A file of this machine, and its path on the volume."""

    local: Path
    remote: str


class Selection(NamedTuple):
    """The files that are copied, and what is not copied, with the reason."""

    files: list[LocalFile]
    left: list[str]


def select_files(recipe: Recipe, mount: str) -> Selection:
    """Find the files of this machine that a recipe names, and where its pods look for them.

    Hub names, URIs and built-in data are not copied. Neither is a path on the volume of which this machine has nothing.

    Raises:
        ConfigError: a relative path names nothing here.
    """
    files, left = [], []
    for place in named_files(recipe, mount):
        if not place.remote.startswith(f"{mount}/"):
            left.append(f"{place}: not on the volume, which pods see at {mount}")
            continue
        found = list(_files(place.path, place.remote))
        if not found and not posixpath.isabs(place.path):
            fix = "run the command where the recipe's relative paths are right"
            raise ConfigError("there is no such file or directory here", where=str(place), fix=fix)
        left += [] if found else [f"{place}: not on this machine; it must be on the volume already"]
        files += found
    return Selection(list(dict.fromkeys(files)), left)


def upload(
    cluster: Cluster,
    volume: RunVolume,
    pod: str,
    file: LocalFile,
    say: Callable[[str], None],
    *,
    overwrite: bool = False,
) -> str:
    """Copy one file, resuming what an earlier upload left; return what was done, in words.

    Raises:
        WriteRefusedError: the volume has another file there, and `overwrite` is False.
        InfrastructureError: the pod cannot be reached, or what arrived differs.
    """
    total, part = file.local.stat().st_size, file.remote + PART
    there, partial = _sizes(cluster, volume, pod, file.remote)
    if there >= 0:
        if there == total and remote_hash(cluster, volume, pod, file.remote) == file_hash(file.local):
            return "is there already"
        if not overwrite:
            fix = "--overwrite replaces it; a run that uses it would then prepare its data again"
            raise WriteRefusedError("the volume has another file of this name", where=file.remote, fix=fix)
    done = 0
    if 0 < partial <= total and remote_hash(cluster, volume, pod, part) == file_hash(file.local, partial):
        done = partial
        say(f"{file.remote}: goes on after {size(done)}")
    else:
        _checked(shell(cluster, volume, pod, BEGIN, part), part)
    _send(cluster, volume, pod, file, done, say)
    if remote_hash(cluster, volume, pod, part) != file_hash(file.local):
        fix = "repeat the command; if it comes again, check the volume"
        raise InfrastructureError("what arrived differs from the file", where=file.remote, fix=fix)
    _checked(shell(cluster, volume, pod, COMMIT, part, file.remote), file.remote)
    return f"{size(total)} copied and compared"


def _files(path: str, remote: str) -> Iterator[LocalFile]:
    """Yield the files that a path, a pattern or a directory names here, each with its path on the volume."""
    for found in sorted(glob.glob(path, recursive=True)):
        target = remote if found == path else _beside(path, remote, found)
        if os.path.isdir(found):
            for file in sorted(p for p in Path(found).rglob("*") if p.is_file()):
                yield LocalFile(file, posixpath.join(target, file.relative_to(found).as_posix()))
        else:
            yield LocalFile(Path(found), target)


def _beside(path: str, remote: str, found: str) -> str:
    """Return where a file that a pattern names lies on the volume, beside the pattern's own path there."""
    path = posixpath.normpath(path)
    root = posixpath.dirname(path[: next((n for n, c in enumerate(path) if c in "*?["), len(path))])
    depth = len(path.split("/")) - len(root.split("/") if root else [])
    base = "/".join(remote.split("/")[:-depth])
    return posixpath.join(base, posixpath.relpath(found, root or "."))


def _send(
    cluster: Cluster, volume: RunVolume, pod: str, file: LocalFile, done: int, say: Callable[[str], None]
) -> None:
    part, total, pause, tries = file.remote + PART, file.local.stat().st_size, FIRST_PAUSE_SECONDS, 0
    began, told, first = time.monotonic(), time.monotonic(), done
    with file.local.open("rb") as content:
        while done < total:
            content.seek(done)
            piece = content.read(PIECE_BYTES)
            sent = shell(cluster, volume, pod, APPEND, part, str(len(piece)), given=piece, seconds=PIECE_SECONDS)
            if sent.code == 0 and int(sent.output or b"-1") == done + len(piece):
                done, tries, pause = done + len(piece), 0, FIRST_PAUSE_SECONDS
            else:
                tries += 1
                if tries == TRIES:
                    _checked(sent._replace(code=None), file.remote)
                time.sleep(pause)
                pause *= 2
                _, arrived = _sizes(cluster, volume, pod, file.remote)
                if arrived != done:  # a part of a piece cannot be trusted: begin again
                    _checked(shell(cluster, volume, pod, BEGIN, part), part)
                    done = first = 0
            if time.monotonic() - told >= TOLD_EVERY_SECONDS:
                told = time.monotonic()
                rate = size(round((done - first) / (told - began)))
                say(f"{file.remote}: {size(done)} of {size(total)} in {duration(told - began)}, {rate}/s")


def _sizes(cluster: Cluster, volume: RunVolume, pod: str, path: str) -> tuple[int, int]:
    """Return the size of a file on the volume, and of what an unfinished upload of it left; -1 for what is not there."""
    done = _checked(shell(cluster, volume, pod, STATE, path, PART), path)
    there, partial = done.output.split()
    return int(there), int(partial)


def remote_hash(cluster: Cluster, volume: RunVolume, pod: str, path: str) -> str:
    """Return the SHA-256 of a file on the volume.

    Raises:
        InfrastructureError: it cannot be read.
    """
    return _checked(shell(cluster, volume, pod, HASH, path, seconds=HASH_SECONDS), path).output.split()[0].decode()


def file_hash(file: Path, count: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first `count` bytes."""
    digest, left = hashlib.sha256(), file.stat().st_size if count is None else count
    with file.open("rb") as content:
        while left > 0 and (piece := content.read(min(left, PIECE_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _checked(done: Executed, where: str) -> Executed:
    if done.code == 0:
        return done
    fix = "repeat the command: it resumes; it needs the right to `create` and `get` pods/exec, and room on the volume"
    raise InfrastructureError(
        f"the volume cannot be used: {done.errors or f'exit code {done.code}'}", where=where, fix=fix
    )
