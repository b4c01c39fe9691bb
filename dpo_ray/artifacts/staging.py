"""Staging: the files of an artifact are written where no reader opens them, and then committed in one atomic step.

On a disk, an attempt writes to `<root>/.staging/<run>/<stage>-<key>.<attempt>/`. The commit writes the manifest there
and renames the directory to `<root>/<stage>-<key>`. An object store cannot rename, so there the files are at
`<root>/<stage>-<key>/<attempt>/` from the start, and the commit is a conditional PUT of `manifest.json`. Each attempt
has a marker file `<root>/.staging/<run>/<stage>-<key>.<attempt>.json`, by which a later driver finds the files that
dead attempts left.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_ray.errors import ArtifactError

from .artifact import Artifact, find_artifact
from .manifest import FileEntry, Manifest, manifest_bytes, parse_manifest
from .names import MANIFEST_NAME, STAGING_NAME, artifact_name, checked_name, checked_run
from .process import Process
from .storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Staging:
    """One attempt to make an artifact. Workers on any machine write its files, and the driver commits it.

    The object can be pickled. If a name is written twice, the second file replaces the first. A task that may run twice
    must therefore write the same bytes under the same name. Or it uses a new name each time, and the driver passes only
    one of the files to `commit`.
    """

    root: Storage
    storage: Storage
    attempt: str
    stage: str
    key: str
    run: str

    def write(self, name: str, data: bytes, rows: int | None = None) -> FileEntry:
        """Write a file of the artifact so that it survives a crash; return its entry for `commit`."""
        return self._placed(self.storage.write(_file_name(name), data, rows))

    def upload(self, name: str, source: Path, rows: int | None = None) -> FileEntry:
        """Copy a local file into the artifact so that it survives a crash; return its entry for `commit`."""
        return self._placed(self.storage.upload(_file_name(name), source, rows))

    def commit(
        self,
        files: Iterable[FileEntry],
        *,
        stage_version: int,
        rows: dict[str, int],
        inputs: dict[str, str],
        config: dict[str, Any],
        figures: dict[str, Any],
        versions: dict[str, str],
        seconds: float,
    ) -> Artifact:
        """Commit exactly these files as the artifact, and delete all other files, which dead or repeated tasks left.

        If another driver has already committed the same artifact, delete the files of this attempt and return that
        artifact. Raises ArtifactError if a file of `files` is missing, has another size or another path, or if a name
        occurs twice.
        """
        if theirs := find_artifact(self.root, self.stage, self.key):
            self.abandon()
            return theirs
        manifest = Manifest(
            stage=self.stage,
            stage_version=stage_version,
            key=self.key,
            run=self.run,
            attempt=self.attempt,
            created_unix_seconds=time.time(),
            seconds=seconds,
            files=self._checked(files),
            rows=rows,
            inputs=inputs,
            config=config,
            figures=figures,
            versions=versions,
        )
        data = manifest_bytes(manifest)
        if self.root.is_local:
            return self._commit_by_rename(data)
        return self._commit_by_put(data)

    def abandon(self) -> None:
        """Delete all files that this attempt has written, unless they are already committed."""
        discard_attempt(self.root, self.stage, self.key, self.run, self.attempt)

    def _commit_by_rename(self, data: bytes) -> Artifact:
        self.storage.write(MANIFEST_NAME, data)
        home = artifact_name(self.stage, self.key)
        for _ in range(3):  # repeats only if something that is not an artifact occupied the directory
            try:
                self.root.rename_into(self.storage, home)
            except FileExistsError:
                if theirs := find_artifact(self.root, self.stage, self.key):
                    self.abandon()
                    return theirs
                self._set_aside(home)
                continue
            except FileNotFoundError as error:
                raise self._superseded() from error
            self.root.delete(marker_name(self.stage, self.key, self.run, self.attempt))
            return Artifact(parse_manifest(data, self.root.full_path(home)), self.root.child(home))
        raise ArtifactError(
            "the artifact's directory exists, but does not contain an artifact",
            where=self.root.full_path(home),
            fix="move that directory away, then run the same command again",
        )

    def _commit_by_put(self, data: bytes) -> Artifact:
        home = self.root.child(artifact_name(self.stage, self.key))
        marker = marker_name(self.stage, self.key, self.run, self.attempt)
        try:
            home.create(MANIFEST_NAME, data)
        except FileExistsError:
            winner = find_artifact(self.root, self.stage, self.key)
            if winner is None:
                what = "the manifest appeared and disappeared again during the commit"
                raise ArtifactError(what, where=home.uri, fix="run the same command again") from None
            # It may be our own: a request whose response was lost is sent again, and then refused.
            if winner.manifest.attempt != self.attempt:
                self.abandon()
                return winner
        # A later driver that considers this attempt dead removes the marker before it looks for the manifest:
        # either it found our manifest and kept the files, or the marker is missing here.
        if not self.root.exists(marker):
            home.delete(MANIFEST_NAME)
            self.abandon()
            raise self._superseded()
        self.root.delete(marker)
        return Artifact(parse_manifest(data, home.uri), home)

    def _checked(self, files: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
        """Check that every entry has its file in the staging directory; delete files that no entry lists."""
        entries = sorted((self._placed(entry) for entry in files), key=lambda entry: entry.name)
        sizes = self.storage.file_sizes()
        seen: set[str] = set()
        for entry in entries:
            where = self.storage.full_path(entry.name)
            if entry.name in seen:
                raise ArtifactError(
                    f"the file {entry.name!r} is listed twice", where=where, fix="use a different name for each file"
                )
            seen.add(entry.name)
            if entry.name not in sizes:
                raise ArtifactError("a file of the artifact is missing", where=where, fix="run the same command again")
            if sizes[entry.name] != entry.bytes:
                what = f"the file has {sizes[entry.name]} bytes, but its entry records {entry.bytes}"
                raise ArtifactError(what, where=where, fix="run the same command again")
            if self.root.is_local:
                self.storage.local_path(entry.name)  # refuses symbolic links
        for name in sizes.keys() - seen:
            self.storage.delete(name)
        return tuple(entries)

    def _placed(self, entry: FileEntry) -> FileEntry:
        """Return a copy of a file's entry, with `path` set to the file's path relative to the artifact's directory."""
        path = entry.name if self.root.is_local else f"{self.attempt}/{entry.name}"
        if entry.path not in (entry.name, path):
            raise ArtifactError(
                f"the entry of the file {entry.name!r} records the path {entry.path!r}, but the file belongs at {path!r}",
                where=self.storage.uri,
                fix="commit only entries that `write` or `upload` of this attempt returned",
            )
        _file_name(entry.name)
        return entry.model_copy(update={"path": path})

    def _set_aside(self, home: str) -> None:
        aside = f"{home}.damaged-{self.attempt}"
        try:
            self.root.rename_into(self.root.child(home), aside)
        except FileNotFoundError:
            return  # another process has moved it
        logger.warning("%s had no valid manifest and was moved to %s", self.root.full_path(home), aside)

    def _superseded(self) -> ArtifactError:
        return ArtifactError(
            "the files of this attempt were deleted: a later driver of the run considered the attempt dead",
            where=self.storage.uri,
            fix="let that driver continue, or run the same command again",
        )


def begin_attempt(root: Storage, stage: str, key: str, run: str) -> Staging:
    """Begin a new attempt to make an artifact, with a staging directory that no other attempt uses."""
    name, attempt = artifact_name(stage, key), f"{int(time.time()):x}-{secrets.token_hex(6)}"
    place = (STAGING_NAME, checked_run(run), f"{name}.{attempt}") if root.is_local else (name, attempt)
    storage = root.child(*place)
    process = dataclasses.asdict(Process.current())
    root.write(marker_name(stage, key, run, attempt), json.dumps(process).encode())
    return Staging(root, storage, attempt, stage, key, run)


def discard_attempt(root: Storage, stage: str, key: str, run: str, attempt: str) -> None:
    """Delete the marker file of an attempt to make an artifact and, unless they are committed, the attempt's files."""
    name = artifact_name(stage, key)
    root.delete(marker_name(stage, key, run, attempt))
    if root.is_local:
        root.delete_tree(f"{STAGING_NAME}/{checked_run(run)}/{name}.{attempt}")
        return
    committed = find_artifact(root, stage, key)
    if committed is None or committed.manifest.attempt != attempt:
        root.delete_tree(f"{name}/{attempt}")


def marker_name(stage: str, key: str, run: str, attempt: str) -> str:
    """Return the name of an attempt's marker file, which records the process that began the attempt."""
    return f"{STAGING_NAME}/{checked_run(run)}/{artifact_name(stage, key)}.{attempt}.json"


def _file_name(name: str) -> str:
    if checked_name(name) == MANIFEST_NAME:
        raise ArtifactError(f"the name {MANIFEST_NAME!r} is reserved for the commit")
    return name
