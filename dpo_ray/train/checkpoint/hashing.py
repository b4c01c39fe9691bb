"""Digests of a checkpoint's files. Each rank hashes the files that it wrote, so hashing is as parallel as writing.

DCP (PyTorch's distributed checkpoint) gathers the write results of all ranks on rank 0. The digests travel with these
results, so they need no message, file or synchronisation of their own.
"""

from __future__ import annotations

import hashlib

from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter  # part of torch, but not exported yet
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dpo_ray.artifacts.storage import Storage

_CHUNK_BYTES = 1 << 22
_PROBE_BYTES = 1 << 20


def digest(directory: Storage, name: str) -> str:
    """Return the sha256 of a file's content."""
    h = hashlib.sha256()
    with directory.open_input(name) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            h.update(chunk)
    return h.hexdigest()


class _Digests(WriteResult):
    """An additional write result, whose `storage_data` is a dict with the digest of each file that a rank wrote."""


class HashingWriter(FileSystemWriter):
    """A DCP writer for disks. After writing, the same thread reads the files back and hashes them."""

    def __init__(self, directory: Storage) -> None:
        """Prepare a writer that writes to `directory`."""
        super().__init__(directory.full_path(), sync_files=True)
        self.digests: dict[str, str] = {}  # of the files of all ranks; filled by `finish`, on rank 0 only
        self._directory = directory

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files; return the write results, followed by the digests of the files.

        Raises:
            DpoRayError: the disk or the object store refuses to write. The message is the storage's own and says why.
        """
        try:
            results = super().write_data(plan, planner).wait()
        except (RuntimeError, OSError):  # on a full disk torch may raise a RuntimeError that does not say so
            self._directory.write("probe", bytes(_PROBE_BYTES))
            raise
        names = sorted({result.storage_data.relative_path for result in results})
        digests = {name: digest(self._directory, name) for name in names}
        hashed: Future[list[WriteResult]] = Future()
        hashed.set_result([*results, _Digests(MetadataIndex(""), 0, digests)])
        return hashed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Store the digests of all ranks in `self.digests`, and write `.metadata` from the other results.

        Runs on rank 0 only.
        """
        for of_rank in results:
            for result in of_rank:
                if isinstance(result, _Digests):
                    self.digests |= result.storage_data
        super().finish(metadata, [[r for r in of_rank if not isinstance(r, _Digests)] for of_rank in results])


class HashingObjectWriter(HashingWriter, FsspecWriter):
    """A `HashingWriter` that writes to an object store."""


def hashing_writer(directory: Storage) -> HashingWriter:
    """Build a writer for a directory on a disk or in an object store."""
    return HashingWriter(directory) if directory.is_local else HashingObjectWriter(directory)
