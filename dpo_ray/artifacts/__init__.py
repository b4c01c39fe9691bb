"""Artifacts, the results of stages: named by a hash, committed atomically, and opened only through their manifest.

`digest` computes the hashes; `storage` is a directory on a disk or in an object store; `manifest` lists the files of an
artifact; `store` finds artifacts and begins new ones; `lease` allows only one driver at a time to write to a run. No
other package renames or fsyncs files.
"""

from .artifact import Artifact
from .lease import Lease
from .manifest import FileEntry, Manifest
from .staging import Staging
from .storage import Storage
from .store import ArtifactStore

__all__ = ["Artifact", "ArtifactStore", "FileEntry", "Lease", "Manifest", "Staging", "Storage"]
