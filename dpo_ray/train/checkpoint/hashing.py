"""Digests of a checkpoint's files, each by the rank that wrote the file: as many hash at a time as write.

They reach rank 0 with what DCP gathers there when all have written: no message, no file and no moment of their own.
"""

from __future__ import annotations

import hashlib

from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter  # torch's own; not exported yet
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dpo_ray.artifacts.storage import Storage

_CHUNK_BYTES = 1 << 22


def digest(directory: Storage, name: str) -> str:
    """Read a file, and return its sha256."""
    h = hashlib.sha256()
    with directory.open_input(name) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            h.update(chunk)
    return h.hexdigest()


class _Digests(WriteResult):
    """A rank's digests by file name, as `storage_data`, among the results of its writes."""


class HashingWriter(FileSystemWriter):
    """Writes files to a disk as DCP does, reads them back and hashes them, in the thread that writes."""

    def __init__(self, directory: Storage) -> None:
        """Write to `directory`."""
        super().__init__(directory.full_path(), sync_files=True)
        self.digests: dict[str, str] = {}  # of all ranks' files; on rank 0, once all have written
        self._directory = directory

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; its results say its digest too."""
        results = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in results})
        digests = {name: digest(self._directory, name) for name in names}
        hashed: Future[list[WriteResult]] = Future()
        hashed.set_result([*results, _Digests(MetadataIndex(""), 0, digests)])
        return hashed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Take all ranks' digests out of their results, and write `.metadata` of the rest; on rank 0."""
        for of_rank in results:
            for result in of_rank:
                if isinstance(result, _Digests):
                    self.digests |= result.storage_data
        super().finish(metadata, [[r for r in of_rank if not isinstance(r, _Digests)] for of_rank in results])


class HashingObjectWriter(HashingWriter, FsspecWriter):
    """Does the same on an object store."""


def hashing_writer(directory: Storage) -> HashingWriter:
    """Make a writer for a directory, wherever that is."""
    return HashingWriter(directory) if directory.is_local else HashingObjectWriter(directory)
