"""What ended a group of workers is named by the error that one of them raised, not by what that did to the others."""

from __future__ import annotations

import pytest
from ray.train import WorkerGroupError

from dpo_ray.cluster.workers import first_cause
from dpo_ray.errors import StorageFailedError

OURS = StorageFailedError("a checkpoint could not be written", where="s3://b/x")


@pytest.mark.parametrize("failures", [{0: RuntimeError("connection closed"), 1: OURS}, {0: OURS, 1: RuntimeError("x")}])
def test_the_cause_is_our_own_error(failures: dict[int, Exception]) -> None:
    assert first_cause(WorkerGroupError("failed", failures)) is OURS


def test_without_one_of_ours_it_is_that_of_the_first_rank() -> None:
    first = RuntimeError("killed")
    assert first_cause(WorkerGroupError("failed", {0: first, 1: RuntimeError("x")})) is first
