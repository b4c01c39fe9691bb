"""Digests of a checkpoint's files. Each rank hashes the files that it wrote, so all ranks share the work.

DCP (PyTorch's distributed checkpoint) gathers the write results of all ranks on rank 0. The digests are sent with these
results, so no further message, file or synchronisation is needed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter  # part of torch, but not exported yet
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dpo_ray.artifacts.disk import make_dirs, private_opener
from dpo_ray.artifacts.storage import Storage

_CHUNK_BYTES = 1 << 22
_PROBE, _PROBE_BYTES = "probe", 1 << 20


def digest(directory: Storage, name: str) -> str:
    """Return the sha256 of a file's content."""
    h = hashlib.sha256()
    with directory.open_input(name) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            h.update(chunk)
    return h.hexdigest()


class _Digests(WriteResult):
    """An additional write result, whose `storage_data` is a dict with the digest of each file that a rank wrote."""


class _PrivateFiles(FileSystem):
    """A FileSystem of DCP that creates files and directories with the access rights of all other files of dpo_ray."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[Any]]:
        """Open a file. If the file is created, it gets the access rights of all other files of dpo_ray."""
        with open(path, mode, opener=private_opener) as stream:
            yield stream

    def mkdir(self, path: str | os.PathLike) -> None:
        """Create a directory and its parents."""
        make_dirs(Path(path))


class HashingWriter(FileSystemWriter):
    """A DCP writer for disks. After writing, the same thread reads the files back and hashes them."""

    def __init__(self, directory: Storage, own_files: Mapping[str, bytes]) -> None:
        """Prepare to write to `directory`. `own_files` are further files that this rank writes, by name."""
        super().__init__(directory.full_path(), sync_files=True)
        if directory.is_local:
            self.fs = _PrivateFiles()
        self.digests: dict[str, str] = {}  # of the files of all ranks; filled by `finish`, on rank 0 only
        self._directory, self._own_files = directory, own_files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files; return the write results, followed by the digests of the files.

        Raises:
            DpoRayError: the disk or the object store refuses to write. The message is that of the storage, and states
                the reason.
        """
        try:
            results = super().write_data(plan, planner).wait()
        except (RuntimeError, OSError):  # on a full disk this write fails, too, with an error that says what to do
            self._directory.write(_PROBE, bytes(_PROBE_BYTES))
            self._directory.delete(_PROBE)
            raise
        own = {name: self._directory.write(name, data).sha256 for name, data in self._own_files.items()}
        names = sorted({result.storage_data.relative_path for result in results})
        digests = own | {name: digest(self._directory, name) for name in names}
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


def hashing_writer(directory: Storage, own_files: Mapping[str, bytes]) -> HashingWriter:
    """Build a writer for a directory on a disk or in an object store, with further files of this rank by name."""
    return (HashingWriter if directory.is_local else HashingObjectWriter)(directory, own_files)
