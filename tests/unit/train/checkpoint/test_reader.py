"""Reading a checkpoint runs no code, even where its manifest was forged as well: such a checkpoint is passed over."""

from __future__ import annotations

import io
import os
import pickle  # noqa: TID251 (to forge what DCP reads)
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError
from dpo_ray.train.checkpoint import checkpoint
from dpo_ray.train.checkpoint.checkpoint import Checkpoints
from tests.unit.train.checkpoint.test_checkpoint import digests, make, resign, run, same, state_of


class Touches:
    """Leaves the file `ran` in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


class TouchesInMetadata:
    """DCP's own class, and in its state a call that DCP does not make."""

    def __reduce__(self) -> tuple:
        return Metadata, ({}, None, {}), {"version": Touches()}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.chdir(tmp_path)
    return Storage(tmp_path / "checkpoints")


def files_of(root: Path) -> Path:
    (directory,) = (root / "step-000000004").iterdir()
    return directory


def forge(root: Path, metadata: object, unlisted: tuple[str, ...] = ()) -> None:
    """Replace the metadata, and sign all files but those that stay unlisted."""
    if metadata is not None:
        (files_of(root) / ".metadata").write_bytes(pickle.dumps(metadata))
    resign(root, files={name: sha256 for name, sha256 in digests(files_of(root)).items() if name not in unlisted})


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        (lambda root: forge(root, Touches()), "refers to posix.system"),
        (lambda root: forge(root, TouchesInMetadata()), "refers to posix.system"),
        (lambda root: forge(root, getattr), "refers to builtins.getattr"),
        (lambda root: forge(root, {"a": 1}), ".metadata cannot be read: AttributeError"),
        (lambda root: forge(root, Touches(), unlisted=(".metadata",)), "is not what was written"),
        (lambda root: forge(root, None, unlisted=("__0_0.distcp",)), "refers to files that are not part of"),
        (lambda root: resign(root, files={}), "is not what was written"),
    ],
)
def test_a_forged_checkpoint_is_set_aside(forged: Callable[[Path], None], reason: str, disk: Storage) -> None:
    states = run(Checkpoints(disk, "a-1", 2), 0, [2, 4], *make())
    forged(disk.local_path())
    policy, optimizer = make(9)
    assert Checkpoints(disk, "a-2", 2).load_newest(policy, optimizer).step == 2
    assert same(state_of(policy, optimizer), states[2])
    assert reason in disk.read_bytes("damaged/step-000000004.reason").decode()
    assert not Path("ran").exists()


def test_a_forged_value_that_is_no_tensor_runs_nothing(disk: Storage) -> None:
    """Values like the learning rate are pickles of their own in the files of the tensors."""
    run(Checkpoints(disk, "a-1", 2), 0, [4], *make())
    directory, forged = files_of(disk.local_path()), io.BytesIO()
    file = directory / "__0_0.distcp"
    torch.save(Touches(), forged)
    metadata = FileSystemReader(directory).read_metadata()
    known = metadata.storage_data[MetadataIndex("optimizer.param_groups.0.lr")]
    known.offset, known.length = file.stat().st_size, len(forged.getvalue())
    file.write_bytes(file.read_bytes() + forged.getvalue())
    forge(disk.local_path(), metadata)
    with pytest.raises(ArtifactError, match="could not be read"):
        Checkpoints(disk, "a-2", 2).load_newest(*make(9))
    assert not Path("ran").exists()


def test_what_is_unpickled_is_what_was_verified(disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is exchanged after all files were verified."""
    run(Checkpoints(disk, "a-1", 2), 0, [4], *make())
    real = checkpoint.get_state_dict

    def exchanged_before(*arguments: Any, **options: Any) -> Any:
        (files_of(disk.local_path()) / ".metadata").write_bytes(pickle.dumps(Touches()))
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "get_state_dict", exchanged_before)
    with pytest.raises(ArtifactError, match="is not what was written"):
        Checkpoints(disk, "a-2", 2).load_newest(*make(9))
    assert not Path("ran").exists()
