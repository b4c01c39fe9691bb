"""The artifact store: it finds committed artifacts, begins new ones, and deletes the files that dead attempts left.

Artifacts are at `<root>/<stage>-<key>/`. The key is a hash of everything that could change the content. So an artifact
that exists is never made again, and an outdated artifact is never found.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

from dpo_ray.errors import ArtifactError

from .artifact import Artifact, find_artifact, read_manifest
from .manifest import Manifest
from .names import STAGING_NAME, checked_run
from .process import Process
from .staging import Staging, begin_attempt, discard_attempt
from .storage import Storage

__all__ = ["Artifact", "ArtifactStore", "Staging"]

logger = logging.getLogger(__name__)

_ATTEMPT = re.compile(r"(?P<stage>[a-z][a-z0-9_-]*)-(?P<key>[A-Za-z0-9_]+)\.(?P<attempt>[0-9a-f]+-[0-9a-f]+)(\.json)?")


class ArtifactStore:
    """The artifacts below one directory. All runs that use this directory share them."""

    def __init__(self, root: Storage) -> None:
        self.root = root

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the committed artifact of a stage and key; return None if there is none, so that the stage has to run.

        Raises ArtifactError if the manifest has a newer format or, on an object store, is damaged.
        """
        return find_artifact(self.root, stage, key)

    def begin(self, stage: str, key: str, run: str) -> Staging:
        """Open a new staging directory for an attempt to make an artifact. `Staging.commit` makes its files visible."""
        return begin_attempt(self.root, stage, key, run)

    def manifests(self, stage: str) -> Iterator[Manifest]:
        """Yield the manifests of all committed artifacts of a stage; a damaged manifest is skipped with a warning."""
        for directory in self.root.list_dirs():
            name, _, key = directory.rpartition("-")
            if name != stage or not key:
                continue
            try:
                manifest = read_manifest(self.root.child(directory))
            except ArtifactError as error:
                logger.warning("this artifact is skipped: %s", error)
                continue
            if manifest is not None and manifest.stage == stage:
                yield manifest

    def verify(self) -> Iterator[tuple[str, ArtifactError | None]]:
        """Check every committed artifact: its manifest, its list of files, and every digest.

        Yields the name of each artifact, and the error that was found in it, or None if it is intact.
        """
        for directory in self.root.list_dirs():
            place = self.root.child(directory)
            try:
                if directory.startswith(".") or (manifest := read_manifest(place)) is None:
                    continue
                Artifact(manifest, place).verify()
            except ArtifactError as error:
                yield directory, error
            else:
                yield directory, None

    def latest(self, stage: str, run: str) -> Manifest | None:
        """Return the newest manifest that this run committed for a stage, to explain why the stage is outdated now."""
        ours = (manifest for manifest in self.manifests(stage) if manifest.run == run)
        return max(ours, key=lambda manifest: manifest.created_unix_seconds, default=None)

    def sweep(self, run: str) -> int:
        """Delete the files that dead attempts of a run left; return the number of these attempts.

        The caller must hold the run's lease. An attempt is kept only if its process is certainly running on this
        machine. Any other attempt is dead, or its driver has lost the lease and must not commit any more.
        """
        place = f"{STAGING_NAME}/{checked_run(run)}"
        below = {name.removeprefix(f"{place}/").partition("/")[0] for name in self.root.list_files(place)}
        below.update(self.root.list_dirs(place))
        attempts = {match.group("stage", "key", "attempt") for name in below if (match := _ATTEMPT.fullmatch(name))}
        swept = 0
        for stage, key, attempt in sorted(attempts):
            if not self._is_alive(f"{place}/{stage}-{key}.{attempt}.json"):
                discard_attempt(self.root, stage, key, run, attempt)
                swept += 1
        return swept

    def _is_alive(self, marker: str) -> bool:
        try:
            process = Process.from_json(json.loads(self.root.read_bytes(marker)))
        except (FileNotFoundError, ValueError, RecursionError):
            return False
        return process is not None and process.is_alive_here()
