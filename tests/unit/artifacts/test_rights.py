"""What is written on a disk is the user's alone, whatever the umask, or the group's where people share a directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_ray.artifacts.journal import Journal
from dpo_ray.artifacts.lease import Lease
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from tests.unit.artifacts.conftest import FILES, commit, write_all


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write_a_run(output: Path) -> None:
    """Write in all the ways in which the parts of a run write."""
    place, store = Storage(output).child("run"), ArtifactStore(Storage(output).child("artifacts"))
    place.check_writable()
    with Lease(place):
        place.write("recipe.yaml", b"a: 1")
        place.write("samples/k/0.parquet", b"x")
        place.append("metrics.jsonl", b"{}")
        place.append("metrics.jsonl", b"{}")
        place.upload("page.html", output.parent / "source")
        staging = store.begin("train", "k", "run")
        commit(staging, write_all(staging, FILES))
        store.begin("evaluate", "k", "run").write("a/b", b"unfinished")
    place.download("recipe.yaml", output / "cache" / "files" / "recipe.yaml")
    journal = Journal(output / "judgements" / "judge" / "answers.jsonl")
    journal.append([b"{}"])
    journal.close()


def rights(root: Path) -> tuple[set[str], set[str]]:
    """Return the rights of all directories below a directory, and of all files."""
    paths = [path for path in root.rglob("*") if path.name != "before"]
    modes = [(path.is_dir(), oct(stat.S_IMODE(path.stat().st_mode))) for path in paths]
    return {mode for is_dir, mode in modes if is_dir}, {mode for is_dir, mode in modes if not is_dir}


@pytest.fixture
def output(tmp_path: Path, umask: int) -> Path:
    (tmp_path / "source").write_bytes(b"x")
    (tmp_path / "source").chmod(0o644)
    return tmp_path / "output"


def test_all_of_a_run_is_the_users_alone(output: Path) -> None:
    write_a_run(output)
    assert rights(output) == ({"0o700"}, {"0o600"})
    assert stat.S_IMODE(output.stat().st_mode) == 0o700


def test_what_existed_keeps_its_rights(output: Path) -> None:
    output.mkdir()
    output.chmod(0o755)
    (output / "run").mkdir()
    (output / "run").chmod(0o750)
    (output / "run" / "metrics.jsonl").write_bytes(b"{}")
    (output / "run" / "metrics.jsonl").chmod(0o644)
    write_a_run(output)
    modes = [stat.S_IMODE((output / name).stat().st_mode) for name in ("", "run", "run/metrics.jsonl")]
    assert modes == [0o755, 0o750, 0o644]
    assert rights(output / "artifacts") == ({"0o700"}, {"0o600"})


def test_a_directory_that_people_share_stays_shared(output: Path) -> None:
    output.mkdir()
    output.chmod(0o2770)
    write_a_run(output)
    assert rights(output) == ({"0o2770"}, {"0o660"})
