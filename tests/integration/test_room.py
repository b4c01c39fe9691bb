"""Room for workers on a real Ray: what can never fit is said at once, what may fit is waited for with a count."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from dpo_ray.cluster import room, workers
from dpo_ray.cluster.placement import check_room, resolve_hardware
from dpo_ray.cluster.resources import Resources
from dpo_ray.cluster.room import capacity, given_back, has_room, wait
from dpo_ray.config.roles import RolesConfig
from dpo_ray.config.train import TrainConfig
from dpo_ray.errors import InfrastructureError, LeaseError, StoppedError, TrainError
from dpo_ray.run.context import recipe_yaml
from tests.helpers.role_resources import WORKER
from tests.integration.conftest import small_recipe

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests' modules
pytestmark = pytest.mark.usefixtures("ray_cluster")
REPOSITORY = Path(__file__).resolve().parents[2]
CPUS = 4  # of the tests' Ray
STAGES = ("prepare", "reference", "schedule", "train", "evaluate")


@contextmanager
def held(cpus: int) -> Iterator[None]:
    """Hold CPUs in another process for the `with` block."""
    group = placement_group([{"CPU": cpus}])
    assert group.wait(30)
    try:
        yield
    finally:
        remove_placement_group(group)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(room, "PROBE_SECONDS", 2.0)
    monkeypatch.setattr(room, "SAY_SECONDS", 0.5)


def live_groups() -> int:
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def test_capacity_is_counted_by_all_that_is_asked_for() -> None:
    assert capacity(Resources("workers", 1.0)) == CPUS
    assert capacity(Resources("workers", 1.5)) == 2
    assert capacity(Resources("workers", 1.0, gpus=1.0)) == 0
    assert capacity(Resources("workers", 1.0, memory_gib=1e6)) == 0
    assert capacity(Resources("workers", 1.0, labels={"dpo/role": "train"})) == 0
    assert capacity(Resources("workers", 1.0, labels={"ray.io/node-id": ray.nodes()[0]["NodeID"]})) == CPUS


def test_what_can_never_fit_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    roles = "cluster.roles.train={cpus: 1, gpus: 0, node_labels: {dpo/role: train}}"
    recipe = small_recipe(tmp_path, roles, "train.workers=3", "ray.address=auto")
    with pytest.raises(InfrastructureError) as raised:
        check_room(recipe, STAGES, 0.0, 0.0, print)
    said = "3 training workers are needed (each: 1 CPU, a node with dpo/role=train), but the nodes can hold only 0"
    assert said in str(raised.value)
    check_room(recipe, ("evaluate",), 0.0, 0.0, print)  # which trains nobody
    many = small_recipe(tmp_path, "train.workers=8", "ray.address=auto")
    with pytest.raises(InfrastructureError, match="needs up to 8 CPUs at the same time, but the cluster has 4"):
        check_room(many, STAGES, 0.0, 0.0, print)
    check_room(small_recipe(tmp_path, "train={workers: 8, min_workers: 2}"), STAGES, 0.0, 0.0, print)


def test_scoring_and_training_side_by_side_need_gpus_of_their_own(tmp_path: Path) -> None:
    beside = small_recipe(tmp_path, "reference.mode=streaming", "ray.address=auto")
    with pytest.raises(InfrastructureError, match="needs up to 2 GPUs at the same time, but the cluster has 0"):
        check_room(beside, STAGES, 1.0, 1.0, print)


def test_labels_do_not_count_on_this_machine_alone(tmp_path: Path) -> None:
    roles = "{train: {node_labels: {dpo/role: train}}, judge: {node_labels: {a: b}}, reference: {node_labels: {a: b}}}"
    here = resolve_hardware(small_recipe(tmp_path, f"cluster.roles={roles}"))
    assert [getattr(here.cluster.roles, name).node_labels for name in RolesConfig.model_fields] == 5 * [{}]
    check_room(here, STAGES, 0.0, 0.0, print)


def test_a_run_does_not_turn_to_cpus_in_silence(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, "ray.address=auto")
    assert resolve_hardware(recipe).cluster.roles.train.gpus == 0.0
    run_dir = tmp_path / "small"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text("cluster: {roles: {train: {gpus: 1.0}}}")
    with pytest.raises(InfrastructureError, match="no node has a GPU for a training worker now"):
        resolve_hardware(recipe)
    on_cpus = small_recipe(tmp_path, "ray.address=auto", "cluster.roles.train.gpus=0")
    assert resolve_hardware(on_cpus).cluster.roles.train.gpus == 0.0


ON_A_CLUSTER_THAT_SCALES = """
import os, sys, pytest, ray
from dataclasses import replace
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
from dpo_ray.cluster.node_groups import VARIABLE, NodeGroup, as_text
from dpo_ray.cluster.placement import check_room, resolve_hardware
from dpo_ray.cluster.room import scales
from dpo_ray.config.load import load_recipe
from dpo_ray.errors import InfrastructureError
from pathlib import Path

CPUS = NodeGroup("training", 2, 0, 8, {"dpo/role": "training"}, 4)

def named(recipe, groups):
    os.environ[VARIABLE] = as_text(groups)
    return recipe

ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
assert not scales()
client = GcsClient(address=ray.get_runtime_context().gcs_address)
client.report_autoscaling_state(autoscaler_pb2.AutoscalingState(autoscaler_state_version=1).SerializeToString())
assert scales()
recipe = load_recipe(Path(sys.argv[1]), ["train.workers=8", "ray.address=auto"])
check_room(recipe, ("train",), 0.0, 0.0, print)
with pytest.raises(InfrastructureError, match="no node has a GPU"):
    resolve_hardware(recipe)

# From here on the cluster names its groups, as one does that dpo-ray has rendered.
roles = resolve_hardware(named(recipe, [CPUS])).cluster.roles
assert (roles.train.gpus, roles.train.node_labels) == (0.0, {"dpo/role": "training"})
assert roles.reference.node_labels == {}
labelled = resolve_hardware(named(recipe, [CPUS]))
check_room(labelled, ("train",), 0.0, 0.0, print)
with pytest.raises(InfrastructureError, match="8 training workers are needed .* can hold only 6"):
    check_room(named(labelled, [replace(CPUS, most=3)]), ("train",), 0.0, 0.0, print)
assert resolve_hardware(named(recipe, [replace(CPUS, gpus=1)])).cluster.roles.train.gpus == 1.0
"""


def test_what_scaling_may_bring_is_waited_for_and_not_refused(tmp_path: Path) -> None:
    """An autoscaler reports to Ray, as its version 2 does; the cluster is one that scales from then on."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(small_recipe(tmp_path)))
    program = [sys.executable, "-c", ON_A_CLUSTER_THAT_SCALES, str(path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "8 training workers are needed (each: 1 CPU), but the nodes can hold only 4" in done.stdout
    labelled = (
        "8 training workers are needed (each: 1 CPU, a node with dpo/role=training), but the nodes can hold only 0"
    )
    assert f"the run waits until it has more nodes: {labelled}" in done.stdout


@pytest.mark.usefixtures("quick")
def test_waiting_is_said_with_a_count_and_ends_when_there_is_room() -> None:
    said: list[str] = []
    with held(3):
        release = threading.Event()

        def wait_for_three() -> None:
            assert wait(Resources("training workers", 1.0), 3, 3, said.append) == 3
            release.set()

        thread = threading.Thread(target=wait_for_three)
        thread.start()
        until = time.monotonic() + 30
        while not said and time.monotonic() < until:
            time.sleep(0.1)
        assert not release.is_set()
    thread.join(30)
    assert release.is_set()
    assert (
        said[0] == "3 training workers wait for free resources, and the present nodes could hold 3; each requests 1 CPU"
    )
    assert live_groups() == 0


@pytest.mark.usefixtures("quick")
def test_fewer_begin_where_there_is_not_room_for_all() -> None:
    said: list[str] = []
    with held(2):
        assert wait(Resources("training workers", 1.0), 1, 4, said.append) == 2
        assert has_room(Resources("training workers", 1.0), 2)
        assert not has_room(Resources("training workers", 1.0), 3)
    assert said[-1] == "there are free resources for only 2 of 4 training workers: the run continues with these"
    assert wait(Resources("training workers", 1.0), 1, 4, said.append) == 4
    assert live_groups() == 0


@pytest.mark.usefixtures("quick")
def test_fewer_than_the_least_do_not_begin() -> None:
    ask, counts = Resources("training workers", 1.0), []
    with held(1):
        with held(1):
            thread = threading.Thread(target=lambda: counts.append(wait(ask, 3, 4, print)))
            thread.start()
            thread.join(8)  # twice as long as it takes to find room for some
            assert counts == []
        thread.join(30)
        assert counts == [3]
    assert live_groups() == 0


def fail_to_start(ask: Resources) -> None:
    with given_back(ask, 2):
        assert placement_group([{"CPU": 1}, {"CPU": 1}]).wait(30)
        raise TrainError("did not start")


def test_what_an_attempt_leaves_behind_is_given_back() -> None:
    ask = Resources("training workers", 1.0)
    with held(1):
        other = placement_group([{"CPU": 1}], name="of somebody else in this program")
        with pytest.raises(TrainError, match="did not start"):
            fail_to_start(ask)
        assert live_groups() == 2  # what is of others stays
        remove_placement_group(other)
        assert has_room(ask, 3)


@pytest.mark.usefixtures("quick")
def test_who_is_told_to_stop_waits_no_longer() -> None:
    with held(3), pytest.raises(StoppedError, match="while 2 training workers waited for resources"):
        wait(Resources("training workers", 1.0), 2, 2, print, gives_up=lambda: True)
    assert live_groups() == 0


def once_more(settings: dict[str, Any]) -> dict[str, Any]:
    """Fail on the first call, and remember that in a file."""
    import ray.train

    tried = Path(settings["task"])
    if not tried.exists() and ray.train.get_context().get_world_rank() == 0:
        tried.touch()
        raise RuntimeError("the first attempt fails")
    return {"workers": ray.train.get_context().get_world_size()}


@pytest.mark.slow
def test_workers_begin_again_as_often_as_is_allowed(tmp_path: Path) -> None:
    said: list[str] = []
    config = TrainConfig(workers=2, max_failures=1)
    names = {"where": "train", "goes_on": "from the start"}
    done = workers.run_workers(once_more, str(tmp_path / "a"), config, WORKER, name="again", say=said.append, **names)
    assert done == {"workers": 2}
    assert said == [
        "training workers were lost (RuntimeError: the first attempt fails): all workers start again from the start"
    ]
    never = config.model_copy(update={"max_failures": 0})
    with pytest.raises(TrainError, match="the first attempt fails"):
        workers.run_workers(once_more, str(tmp_path / "b"), never, WORKER, name="never", say=said.append, **names)
    with pytest.raises(TrainError, match="the first attempt fails"):
        workers.run_workers(
            once_more, str(tmp_path / "c"), config, WORKER, name="up", say=said.append, gives_up=lambda: True, **names
        )
    assert len(said) == 1
    starts = iter([None, LeaseError("this driver lost the run")])

    def may_start() -> None:
        if (error := next(starts)) is not None:
            raise error

    with pytest.raises(LeaseError, match="lost the run"):  # its new workers would replace those of another driver
        workers.run_workers(
            once_more, str(tmp_path / "d"), config, WORKER, name="lost", say=said.append, may_start=may_start, **names
        )
    assert live_groups() == 0
