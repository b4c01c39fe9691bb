"""Reading of a checkpoint's files without running code from them, even if somebody has forged files and manifest.

In DCP, the file `.metadata` is a pickle, and so is every value that is not a tensor. Here the bytes of `.metadata` are
compared with the digest in the manifest, and then read by an unpickler that allows only the classes of DCP's metadata.
Values that are not tensors are read by `torch.load` with `weights_only=True`, which allows numbers, texts and
containers of them.
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
    """An unpickler for DCP's metadata. It raises ArtifactError for any other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _CLASSES:
            raise ArtifactError(
                f"{METADATA} refers to {module}.{name}, which no checkpoint needs: it was not loaded, because this file is "
                "damaged or was not written by dpo-ray"
            )
        return super().find_class(module, name)


def read_metadata(directory: Storage, digests: dict[str, str]) -> dcp.Metadata:
    """Read DCP's metadata, after its bytes have been compared with the digest in the manifest.

    Args:
        digests: sha256 of each file of the checkpoint, from its manifest.

    Raises:
        ArtifactError: the manifest does not list the file, the bytes have another digest or are not metadata, or the
            metadata refers to files that the manifest does not list.
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
    """A DCP reader of a directory on a disk or an object store. It never runs code from the metadata."""

    def __init__(self, directory: Storage, digests: dict[str, str]) -> None:
        """Prepare to read a checkpoint whose manifest lists `digests`."""
        super().__init__(directory.full_path())
        if not directory.is_local:
            self.fs = ObjectFileSystem()
            self.path = self.fs.init_path(directory.uri)
        self._directory, self._digests = directory, digests

    def read_metadata(self, *_: Any, **options: Any) -> dcp.Metadata:
        """Read the metadata.

        If this fails, DCP calls this method again, with `rank`, to read a metadata file of one rank. There is no such
        file, so this raises ArtifactError.
        """
        if options:
            raise ArtifactError(f"{METADATA} cannot be used", where=self._directory.uri)
        metadata = read_metadata(self._directory, self._digests)
        metadata.storage_meta = metadata.storage_meta or dcp.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """A DCP planner that reads values that are not tensors without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read a value that is not a tensor, and put it into the state that is being loaded."""
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))  # noqa: TID251
