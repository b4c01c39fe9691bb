"""Fixtures that more than one kind of test needs: one Ray for the whole session, and the built-in model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Without a deadline, as on a busy machine an example may take long.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Ray gives its workers a low priority, at which any other process on a busy machine can stop them for minutes.
os.environ.setdefault("RAY_worker_niceness", "0")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start one local Ray, which takes 5 to 10 s, for all tests that need one."""
    import ray

    from dpo_ray.cluster.session import DRIVER_ENVIRONMENT, WORKER_ENVIRONMENT

    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(DRIVER_ENVIRONMENT | WORKER_ENVIRONMENT)
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=512 << 20, log_to_driver=False)
    yield
    ray.shutdown()
