"""Reading of a checkpoint's files such that none of them can run code, even where its manifest was forged as well.

DCP's `.metadata` is a pickle, and so is every value that is no tensor. Here `.metadata` is unpickled from the bytes
that were compared with the manifest's digest, by an unpickler that knows only the classes of DCP's metadata. Values
that are no tensors are read as weights are, which allows numbers, texts and containers of them.
"""

from __future__ import annotations

import hashlib
import io
import pickle  # noqa: TID251 (DCP's own format, of which only the classes below are allowed)
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as ObjectFileSystem
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import ReadItem

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError

METADATA = ".metadata"
_CLASSES = {
    (dcp.__name__, "BytesStorageMetadata"),
    (dcp.__name__, "ChunkStorageMetadata"),
    (dcp.__name__, "Metadata"),
    (dcp.__name__, "MetadataIndex"),
    (dcp.__name__, "StorageMeta"),
    (dcp.__name__, "TensorProperties"),
    (dcp.__name__, "TensorStorageMetadata"),
    (dcp.__name__, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # looks a layout up by its name
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Rebuilds DCP's metadata, and raises ArtifactError for any other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _CLASSES:
            raise ArtifactError(f"{METADATA} names {module}.{name}, which no checkpoint contains")
        return super().find_class(module, name)


def read_metadata(directory: Storage, digests: dict[str, str]) -> dcp.Metadata:
    """Read DCP's metadata from the bytes that have the manifest's digest.

    Args:
        digests: sha256 of each file of the checkpoint, from its manifest.

    Raises:
        ArtifactError: the manifest does not list the file, its content is another or no metadata, or it refers to files
            that the manifest does not list.
    """
    try:
        data = directory.read_bytes(METADATA)
        if hashlib.sha256(data).hexdigest() != digests.get(METADATA):
            raise ArtifactError(f"{METADATA} is not what was written", where=directory.uri)
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        files = {stored.relative_path for stored in metadata.storage_data.values()}
    except ArtifactError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise ArtifactError(f"{METADATA} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, dcp.Metadata) or not files <= digests.keys():
        raise ArtifactError(f"{METADATA} refers to files that are not part of the checkpoint", where=directory.uri)
    return metadata


class Reader(FileSystemReader):
    """DCP's reader of a directory on a disk or an object store, with the metadata read as above."""

    def __init__(self, directory: Storage, digests: dict[str, str]) -> None:
        """Read a checkpoint whose manifest lists `digests`."""
        super().__init__(directory.full_path())
        if not directory.is_local:
            self.fs = ObjectFileSystem()
            self.path = self.fs.init_path(directory.uri)
        self._directory, self._digests = directory, digests

    def read_metadata(self, *_: Any, **options: Any) -> dcp.Metadata:
        """Read the metadata. DCP asks with a `rank` if that fails, for a file of that rank alone: there is none."""
        if options:
            raise ArtifactError(f"{METADATA} cannot be used", where=self._directory.uri)
        metadata = read_metadata(self._directory, self._digests)
        metadata.storage_meta = metadata.storage_meta or dcp.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """DCP's planner, which reads values that are no tensors without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Place a value in the state that is being loaded."""
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))  # noqa: TID251
