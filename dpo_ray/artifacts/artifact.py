"""Committed artifacts. A file is opened through the manifest, and checked by the size and digest in the manifest."""

from __future__ import annotations

import functools
import hashlib
import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dpo_ray.errors import ArtifactError

from .digest import file_sha256
from .disk import COPY_CHUNK_BYTES
from .manifest import FileEntry, Manifest, parse_manifest
from .names import MANIFEST_NAME, artifact_name
from .storage import Storage

logger = logging.getLogger(__name__)
MAX_HASHING_THREADS = 8  # a disk and a processor of a node are busy with these


@dataclass(frozen=True)
class Artifact:
    """The committed result of a stage. The object holds no file content, so it can be pickled and sent to workers."""

    manifest: Manifest
    storage: Storage  # the artifact's directory

    @property
    def key(self) -> str:
        """Return this artifact's key: a hash of the stage, and of the stage's version, config and inputs."""
        return self.manifest.key

    @property
    def stage(self) -> str:
        """Return the name of the stage that made this artifact."""
        return self.manifest.stage

    @property
    def rows(self) -> dict[str, int]:
        """Return the row counts that the manifest records."""
        return self.manifest.rows

    def names(self, prefix: str = "") -> list[str]:
        """List the sorted names of the files whose names begin with a prefix."""
        return sorted(entry.name for entry in self.manifest.files if entry.name.startswith(prefix))

    def entry(self, name: str) -> FileEntry:
        """Return the manifest's entry for a file; raise ArtifactError if the file is not listed."""
        if (entry := self._entries.get(name)) is None:
            raise ArtifactError(f"the manifest lists no file {name!r}", where=self.storage.uri, fix=_RERUN)
        return entry

    @functools.cached_property
    def _entries(self) -> dict[str, FileEntry]:
        return {entry.name: entry for entry in self.manifest.files}

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading, after checking its size.

        On a disk, each process also checks the file's digest once. An object store itself checks its files against
        checksums.
        """
        entry = self.entry(name)
        self._check_size(entry)
        if self.storage.is_local:
            self._check_digest(entry)
        return self._open(entry)

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file and check its digest."""
        entry = self.entry(name)
        try:
            data = self.storage.read_bytes(entry.path)
        except FileNotFoundError as error:
            raise self._missing(entry) from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise self._damaged(entry, "differs from the manifest's sha256")
        return data

    def local_dir(self, prefix: str, cache: Path) -> Path:
        """Return a local directory with the files below a prefix ("" for all files), for libraries that need paths.

        If the artifact is on a disk, return the artifact's directory itself; each process checks every file once
        against its sha256. If the artifact is in an object store, copy the files into a directory below `cache`.
        Several workers of a machine may share the copy, because a file gets its final name only after its sha256 was
        checked.
        """
        prefix = prefix.rstrip("/")
        entries = [entry for entry in self.manifest.files if not prefix or entry.name.startswith(f"{prefix}/")]
        if not entries:
            raise ArtifactError(f"the manifest lists no files below {prefix!r}", where=self.storage.uri, fix=_RERUN)
        if self.storage.is_local:
            for entry in entries:
                self._check_size(entry)
            with ThreadPoolExecutor(MAX_HASHING_THREADS) as threads:
                list(threads.map(self._check_digest, entries))  # raises what a thread has raised
            return self.storage.local_path(prefix)
        # The attempt is part of the path, so a rebuilt artifact never mixes with the deleted one.
        home = Path(cache) / artifact_name(self.stage, self.key) / self.manifest.attempt
        for entry in entries:
            self._fetch(entry, home / entry.name)
        return home / prefix if prefix else home

    def verify(self, deep: bool = True) -> None:
        """Check that the manifest is unchanged, and that the files and their sizes are exactly those in the manifest.

        With `deep`, also compare every file with its sha256. Raises an ArtifactError that names the file and says what
        to do.
        """
        if read_manifest(self.storage) != self.manifest:
            raise ArtifactError("the manifest has changed since it was opened", where=self.storage.uri, fix=_RERUN)
        sizes = self.storage.file_sizes()
        for entry in self.manifest.files:
            if entry.path not in sizes:
                raise self._missing(entry)
            if self.storage.is_local:
                self.storage.local_path(entry.path)  # refuses symbolic links
            self._check_size(entry, sizes[entry.path])
            if deep and self._sha256(entry) != entry.sha256:
                raise self._damaged(entry, "differs from the manifest's sha256")
        # On an object store, the files of other attempts may lie beside those of the committed attempt.
        home = "" if self.storage.is_local else f"{self.manifest.attempt}/"
        listed = {MANIFEST_NAME, *(entry.path for entry in self.manifest.files)}
        if extra := sorted(path for path in sizes if path.startswith(home) and path not in listed):
            raise ArtifactError(
                f"a file is not in the manifest: {extra[0]!r}",
                where=self.storage.uri,
                fix=f"remove it, or {_RERUN}",
            )

    def _fetch(self, entry: FileEntry, target: Path) -> None:
        if target.exists() and target.stat().st_size == entry.bytes:
            return  # a file gets this name only after its digest was checked
        unchecked = target.with_name(f"{target.name}.unchecked-{secrets.token_hex(8)}")
        try:
            self.storage.download(entry.path, unchecked)
            if file_sha256(unchecked) != entry.sha256:
                raise self._damaged(entry, "differs from the manifest's sha256")
            unchecked.replace(target)
        except FileNotFoundError as error:
            raise self._missing(entry) from error
        finally:
            unchecked.unlink(missing_ok=True)

    def _check_size(self, entry: FileEntry, size: int | None = None) -> None:
        try:
            size = self.storage.size(entry.path) if size is None else size
        except FileNotFoundError as error:
            raise self._missing(entry) from error
        if size != entry.bytes:
            raise self._damaged(entry, f"has {size} bytes, but the manifest records {entry.bytes}")

    def _check_digest(self, entry: FileEntry) -> None:
        """Compare a file with the sha256 in the manifest, unless this process has done so before."""
        checked = (self.storage.uri, self.manifest.attempt, entry.path)
        if checked not in _CHECKED:
            if self._sha256(entry) != entry.sha256:
                raise self._damaged(entry, "differs from the manifest's sha256")
            _CHECKED.add(checked)

    def _sha256(self, entry: FileEntry) -> str:
        sha256 = hashlib.sha256()
        with self._open(entry) as file:
            while chunk := file.read(COPY_CHUNK_BYTES):
                sha256.update(chunk)
        return sha256.hexdigest()

    def _open(self, entry: FileEntry) -> BinaryIO:
        try:
            return self.storage.open_input(entry.path)
        except FileNotFoundError as error:  # it may have disappeared since its size was checked
            raise self._missing(entry) from error

    def _missing(self, entry: FileEntry) -> ArtifactError:
        """Return the error for a file that does not exist: damage to the artifact, or the whole artifact is gone."""
        if self.storage.exists(MANIFEST_NAME):
            return self._damaged(entry, "is missing")
        fix = "if its disk was unmounted, mount it again; then run the same command again, which makes again what is missing"
        return ArtifactError("the whole artifact is gone, with its manifest", where=self.storage.uri, fix=fix)

    def _damaged(self, entry: FileEntry, what: str) -> ArtifactError:
        return ArtifactError(f"the file {entry.name!r} {what}", where=self.storage.full_path(entry.path), fix=_RERUN)


_CHECKED: set[tuple[str, str, str]] = set()  # files of artifacts that this process has compared with their digests
_RERUN = "delete the artifact's directory; its stage then runs again"


def read_manifest(storage: Storage) -> Manifest | None:
    """Read the manifest in an artifact's directory; return None if there is no manifest.

    Raises ArtifactError if the manifest is damaged.
    """
    try:
        data = storage.read_bytes(MANIFEST_NAME)
    except FileNotFoundError:
        return None
    return parse_manifest(data, storage.full_path(MANIFEST_NAME))


def find_artifact(root: Storage, stage: str, key: str) -> Artifact | None:
    """Return the committed artifact of a stage and key; return None if there is none, so that the stage has to run.

    On a disk, a damaged manifest counts as missing, because the next commit can move the damaged artifact away. An
    object store cannot move a directory in one step. On an object store, a damaged manifest therefore raises
    ArtifactError, before work is done that could not be committed.
    """
    storage = root.child(artifact_name(stage, key))
    try:
        manifest = read_manifest(storage)
        if manifest is not None and (manifest.stage, manifest.key) != (stage, key):
            what = f"the manifest belongs to {manifest.stage}-{manifest.key}"
            raise ArtifactError(what, where=storage.uri, fix=_RERUN)
    except ArtifactError as error:
        if not storage.is_local or not isinstance(error.__cause__, ValueError | RecursionError):
            raise  # not a damaged text: the format is newer, the manifest is another artifact's, or the disk fails
        logger.warning("the artifact is not used, and its stage runs again: %s", error)
        return None
    return None if manifest is None else Artifact(manifest, storage)
