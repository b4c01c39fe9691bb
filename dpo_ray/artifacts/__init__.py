"""The results of stages: content-addressed, committed atomically, and opened only through their manifest.

`digest` names things by their content; `storage` is a directory on a disk or in an object store; `manifest` lists
what an artifact holds; `store` finds and begins artifacts; `lease` allows only one driver at a time to own a run.
This package is the only one that renames or fsyncs files.
"""

from .artifact import Artifact
from .lease import Lease
from .manifest import FileEntry, Manifest
from .staging import Staging
from .storage import Storage
from .store import ArtifactStore

__all__ = ["Artifact", "ArtifactStore", "FileEntry", "Lease", "Manifest", "Staging", "Storage"]
