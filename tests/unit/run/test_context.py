"""A driver that has lost its run commits nothing more."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from dpo_ray.artifacts.lease import Lease
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.errors import LeaseError
from dpo_ray.observe.progress import Reporter
from dpo_ray.run.context import RunContext
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
