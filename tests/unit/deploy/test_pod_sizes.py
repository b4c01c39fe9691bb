"""The size of pods: how many there are, and the memory that they have, from the recipe's workers and the model."""

from __future__ import annotations

import pytest

from dpo_ray.deploy.kubernetes.groups import groups
from tests.helpers.manifests import recipe
from tests.unit.deploy.test_render import cluster_spec, made, worker


@pytest.mark.parametrize(
    ("overrides", "name", "replicas", "gpus", "cpus"),
    [
        # 64 workers of 1 GPU and 4 CPUs: 8 nodes of 8
        ((), "training", 8, 8, 32),
        # 16 engines of 4 GPUs and 8 CPUs: 2 on a node of 8
        ((), "engines", 8, 8, 16),
        ((".training={gpus: 4, cpus: 16}",), "training", 16, 4, 16),
        # CPUs of 12 hold 3 workers of 4, whatever GPUs there are: 64 / 3
        ((".training={gpus: 8, cpus: 12}",), "training", 22, 8, 12),
    ],
)
def test_pods_follow_from_workers(overrides, name, replicas, gpus, cpus):
    group = next(g for g in groups(recipe("tulu3_70b_dpo", *overrides)) if g.name == name)
    assert (group.replicas, group.gpus, group.cpus) == (replicas, gpus, cpus)


def memory(name, pipeline, *overrides):
    group = next(g for g in groups(recipe(pipeline, *overrides)) if g.name == name)
    return group.memory_gib


ON_CPUS = (".training={gpus: 0}", ".engines={gpus: 0}", "cluster.roles.train.gpus=0", "cluster.roles.reference.gpus=0")


def test_memory_follows_from_the_model_where_it_is_known():
    # 7.2 billion parameters with gradients and Adam's two moments in float32 take 108 GiB, a copy of the state more
    assert 108 < memory("training", "zephyr_7b_dpo", *ON_CPUS, "train.workers=1") < 500
    assert 27 < memory("engines", "zephyr_7b_dpo", *ON_CPUS, "reference.replicas=1") < 108
    unknown = ("model.path=example/unheard-of", *ON_CPUS, "train.workers=1", "cluster.roles.train.cpus=3")
    assert memory("training", "zephyr_7b_dpo", *unknown) == 4 * 3
    assert memory("training", "zephyr_7b_dpo", *ON_CPUS, ".training.memory_gib=9") == 9
    assert memory("cpu", "zephyr_7b_dpo", *ON_CPUS) == 16


def test_a_pod_with_gpus_has_what_is_offloaded_and_at_least_64_gib_for_each():
    assert memory("training", "zephyr_7b_dpo") == 8 * 64
    offloaded = ("train.workers=8", "train.sharding={cpu_offload: true, shard_workers: null}")
    assert memory("training", "tulu3_70b_dpo", *offloaded) > 8 * 16 * 70 / 8  # bytes per parameter, in billions
    unknown = memory("training", "zephyr_7b_dpo", "model.path=example/unheard-of", ".training={cpus: 32}")
    assert unknown == 4 * 32 + 64 * 8


def test_engines_beside_training_have_memory_of_their_own():
    shared = (".engines=null", ".training.cpus=8")
    one_after_the_other = memory("training", "quickstart", *shared)
    assert one_after_the_other == memory("training", "quickstart", ".training.cpus=8")
    assert memory("training", "quickstart", *shared, "reference.mode=streaming") > one_after_the_other


def test_engines_scale_to_nothing_and_training_never_does():
    manifests = made("quickstart", ("reference.replicas=4", "reference.max_replicas=40"))
    engines = worker(manifests, "engines")
    assert (engines["minReplicas"], engines["replicas"], engines["maxReplicas"]) == (0, 1, 10)  # 4 on a pod
    fixed = made("quickstart", ("reference.max_replicas=40", ".autoscaling=false"))
    assert "enableInTreeAutoscaling" not in cluster_spec(fixed)
    assert all(g["minReplicas"] == g["maxReplicas"] for g in cluster_spec(fixed)["workerGroupSpecs"])
