"""Hold the results of stages: content-addressed, committed atomically, opened only through their manifest.

`digest` names things by their content, `storage` is a directory on a disk or an object store, `manifest` says
what an artifact holds, `store` finds and begins artifacts, `lease` lets one driver at a time own a run.
This package is the only one that renames or fsyncs.
"""

from .artifact import Artifact
from .lease import Lease
from .manifest import FileEntry, Manifest
from .staging import Staging
from .storage import Storage
from .store import ArtifactStore

__all__ = ["Artifact", "ArtifactStore", "FileEntry", "Lease", "Manifest", "Staging", "Storage"]
