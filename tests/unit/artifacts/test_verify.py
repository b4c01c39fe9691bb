"""A file that changed after its commit is found when it is read, and by the command that reads everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dpo_ray.artifacts import artifact as artifact_module
from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.errors import ArtifactError
from tests.helpers.command_line import call

FILES = {"policy/a.bin": b"a" * 1000, "policy/b.bin": b"b" * 1000, "metrics.jsonl": b"{}"}


def committed(root: Path, stage: str = "train") -> Artifact:
    staging = ArtifactStore(Storage(root)).begin(stage, "k", "run")
    entries = [staging.write(name, data) for name, data in FILES.items()]
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows={}, figures={})


def flip(root: Path, name: str = "policy/b.bin", stage: str = "train") -> None:
    file = root / f"{stage}-k" / name
    data = bytearray(file.read_bytes())
    data[500] ^= 1
    file.write_bytes(bytes(data))


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_module, "_CHECKED", set())


@pytest.mark.parametrize(
    "read",
    [
        lambda artifact: artifact.open("policy/b.bin").read(),
        lambda artifact: artifact.read_bytes("policy/b.bin"),
        lambda artifact: artifact.local_dir("policy", Path("nowhere")),
        lambda artifact: artifact.local_dir("", Path("nowhere")),
    ],
    ids=["open", "read_bytes", "local_dir", "all"],
)
def test_a_flipped_bit_is_found_when_the_file_is_read(read: Callable[[Artifact], object], tmp_path: Path) -> None:
    artifact = committed(tmp_path)
    read(artifact)
    artifact_module._CHECKED.clear()
    flip(tmp_path)
    for _ in range(2):  # a file that was found damaged does not count as checked
        with pytest.raises(ArtifactError, match=r"'policy/b\.bin' differs from the manifest's sha256"):
            read(artifact)
    assert artifact.open("policy/a.bin").read() == FILES["policy/a.bin"]


def test_a_file_is_hashed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, hashed = committed(tmp_path), []
    original = Artifact._sha256
    monkeypatch.setattr(Artifact, "_sha256", lambda self, entry: hashed.append(entry.name) or original(self, entry))
    for _ in range(3):
        artifact.open("policy/a.bin").close()
        artifact.local_dir("policy", tmp_path)
    assert sorted(hashed) == ["policy/a.bin", "policy/b.bin"]


def test_the_command_names_every_damaged_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, artifacts = tmp_path / "recipe.yaml", tmp_path / "artifacts"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "x",
                "output": str(tmp_path),
                "model": {"path": "builtin:sentiment_llama"},
                "data": {"train": "a.jsonl"},
            }
        )
    )
    for stage in ("prepare", "train", "evaluate"):
        committed(artifacts, stage)
    code, out, _ = call(capsys, "artifacts", "verify", str(recipe))
    assert (code, "3 artifacts, every file is as it was committed" in out) == (0, True)
    flip(artifacts, stage="prepare")
    (artifacts / "evaluate-k" / "manifest.json").write_text("[" * 100_000)
    code, out, err = call(capsys, "artifacts", "verify", str(recipe))
    assert code == 4
    assert "2 of 3 artifacts are damaged" in err
    assert {line.split(":")[0] for line in out.splitlines()} == {"prepare-k", "evaluate-k"}
    code, out, _ = call(capsys, "artifacts", "verify", str(recipe), "--json")
    assert code == 4
    assert {name for name, what in json.loads(out).items() if what} == {"prepare-k", "evaluate-k"}
