"""Hold the results of stages: content-addressed, committed atomically, opened only through their manifest.

`digest` names things by their content, `storage` is a directory on a disk or an object store, `manifest` says
what an artifact holds, `store` finds and begins artifacts, `lease` lets one driver at a time own a run.
This package is the only one that renames or fsyncs.
"""

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.lease import Lease
from dpo_ray.artifacts.manifest import FileEntry, Manifest
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore

__all__ = ["Artifact", "ArtifactStore", "FileEntry", "Lease", "Manifest", "Staging", "Storage"]
