"""Digests of a checkpoint's files: the rank that wrote a file hashes it, so hashing is as parallel as writing.

The digests reach rank 0 with the write results that DCP gathers there: they need no extra message, file or
synchronisation.
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


def digest(directory: Storage, name: str) -> str:
    """Return the sha256 of a file's content."""
    h = hashlib.sha256()
    with directory.open_input(name) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            h.update(chunk)
    return h.hexdigest()


class _Digests(WriteResult):
    """The digests of a rank's files by name, as `storage_data`; passed along with the results of its writes."""


class _PrivateFiles(FileSystem):
    """DCP's way to a disk, with the rights that all our files have."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[Any]]:
        """Open a file."""
        with open(path, mode, opener=private_opener) as stream:
            yield stream

    def mkdir(self, path: str | os.PathLike) -> None:
        """Create a directory and its parents."""
        make_dirs(Path(path))


class HashingWriter(FileSystemWriter):
    """A DCP writer for disks that reads its files back and hashes them, in the writing thread."""

    def __init__(self, directory: Storage, own_files: Mapping[str, bytes]) -> None:
        """Write to `directory`, along with further files of this rank."""
        super().__init__(directory.full_path(), sync_files=True)
        if directory.is_local:
            self.fs = _PrivateFiles()
        self.digests: dict[str, str] = {}  # of all ranks' files; only on rank 0, after `finish`
        self._directory, self._own_files = directory, own_files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files; the results include their digests."""
        results = super().write_data(plan, planner).wait()
        own = {name: self._directory.write(name, data).sha256 for name, data in self._own_files.items()}
        names = sorted({result.storage_data.relative_path for result in results})
        digests = own | {name: digest(self._directory, name) for name in names}
        hashed: Future[list[WriteResult]] = Future()
        hashed.set_result([*results, _Digests(MetadataIndex(""), 0, digests)])
        return hashed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Remove the digests from the results of all ranks and write `.metadata` from the rest; runs on rank 0."""
        for of_rank in results:
            for result in of_rank:
                if isinstance(result, _Digests):
                    self.digests |= result.storage_data
        super().finish(metadata, [[r for r in of_rank if not isinstance(r, _Digests)] for of_rank in results])


class HashingObjectWriter(HashingWriter, FsspecWriter):
    """The same writer for an object store."""


def hashing_writer(directory: Storage, own_files: Mapping[str, bytes]) -> HashingWriter:
    """Build a writer for a directory on a disk or in an object store, with further files of this rank by name."""
    return (HashingWriter if directory.is_local else HashingObjectWriter)(directory, own_files)
