"""One driver holds a run, by its name and output: another recipe of that name waits, and who lost it commits nothing."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from dpo_ray.artifacts.lease import Lease
from dpo_ray.artifacts.places import run_storage
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.config.load import validate_recipe
from dpo_ray.errors import ArtifactError, LeaseError
from dpo_ray.observe.progress import Reporter
from dpo_ray.run.context import RunContext, lost_files_named, open_run
from dpo_ray.run.planning import Plan


def test_an_artifact_that_was_begun_before_the_run_was_lost_is_not_committed(tmp_path: Path) -> None:
    directory, store = Storage(tmp_path / "run"), ArtifactStore(Storage(tmp_path / "artifacts"))
    with Lease(directory) as lease:
        run = RunContext(cast(Plan, None), cast(Reporter, None), lease)
        for key in ("before", "after"):
            staging, provenance = store.begin("shard", key, "run"), run.provenance_of(1, {}, {})
            if key == "before":
                provenance.commit(staging, [staging.write("a", b"a")], rows={}, figures={})
                continue
            entry = staging.write("a", b"a")
            directory.create("lease-000002.json", b"{}")  # this driver was stopped, and another took over
            with pytest.raises(LeaseError, match="lost the run"):
                provenance.commit(staging, [entry], rows={}, figures={})
    assert store.find("shard", "before") is not None
    assert store.find("shard", "after") is None


def test_of_two_recipes_of_one_name_the_second_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first, second = (
        validate_recipe(
            {
                "name": "same",
                "output": str(tmp_path),
                "seed": seed,
                "model": {"path": "m"},
                "data": {"train": "synthetic"},
            }
        )
        for seed in (1, 2)
    )
    directory = run_storage(first)
    with Lease(directory, holder="the first"):
        directory.write("recipe.yaml", b"seed: 1")
        before = directory.list_files()
        with (
            pytest.raises(LeaseError, match="held by the first"),
            open_run(second, cast(Plan, None), cast(Reporter, None), verbose=False),
        ):
            pass
        assert directory.list_files() == before
        assert directory.read_bytes("recipe.yaml") == b"seed: 1"


def test_a_file_that_disappears_below_the_output_is_no_bug(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="a file of this run is gone") as gone, lost_files_named(str(tmp_path)):
        (tmp_path / "artifacts/train-k/manifest.json").read_bytes()
    assert gone.value.where == str(tmp_path / "artifacts/train-k/manifest.json")
    assert "mount it again" in gone.value.fix
    with pytest.raises(FileNotFoundError), lost_files_named(str(tmp_path)):
        (tmp_path.parent / "elsewhere").read_bytes()
