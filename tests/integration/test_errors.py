"""What our code raises in a worker comes out as itself, with its own exit code, not as Ray's wrapping."""

from __future__ import annotations

import pytest
import ray
import ray.data

from dpo_ray.cluster.session import session
from dpo_ray.errors import ArtifactError, EngineError, InfrastructureError
from tests.integration.conftest import small_recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_an_error_in_a_data_task_keeps_its_kind_and_words(tmp_path) -> None:
    def failing_batch(batch):  # local, so that it is pickled by value: workers cannot import this module
        raise EngineError("no engine", where="here", fix="mend it")

    with pytest.raises(EngineError, match="no engine") as raised, session(small_recipe(tmp_path)):
        ray.data.range(1).map_batches(failing_batch).materialize()
    assert str(raised.value) == "here: no engine\n  -> mend it"


def test_an_error_in_an_actor_keeps_its_kind_and_another_names_its_cause(tmp_path) -> None:
    class FailingActor:
        def work(self):
            raise ArtifactError("damaged", where="there", fix="delete it")

        def crash(self):
            raise ZeroDivisionError("not ours")

    actor = ray.remote(FailingActor).remote()
    with pytest.raises(ArtifactError, match="damaged"), session(small_recipe(tmp_path)):
        ray.get(actor.work.remote())
    with pytest.raises(InfrastructureError, match="not ours"), session(small_recipe(tmp_path)):
        ray.get(actor.crash.remote())
