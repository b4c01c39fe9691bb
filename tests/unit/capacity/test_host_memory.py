"""The memory of nodes: everything on CPUs; what is offloaded, and copies of the state, on nodes with GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpo_ray.capacity.host_memory import GIB, engine_bytes, export_bytes, node_gib, training_worker_bytes
from dpo_ray.capacity.model_sizes import KNOWN, ModelSizes
from dpo_ray.capacity.workload import assumed_workload
from tests.helpers.manifests import recipe

MISTRAL = next(sizes for names, sizes in KNOWN if "zephyr-7b" in names)
PARAMETERS = 7_241_732_096  # of mistralai/Mistral-7B-v0.1, by the index of its files


def workers(*overrides: str, on_gpu: bool, sizes: ModelSizes = MISTRAL) -> float:
    made = recipe("zephyr_7b_dpo", *overrides)
    return training_worker_bytes(made, sizes, assumed_workload(made), on_gpu=on_gpu)


def test_a_worker_on_cpus_holds_weights_state_and_gradients() -> None:
    one = workers("train.workers=1", "train.optimizer.type=adamw", on_gpu=False)
    assert one > 4 * 4 * PARAMETERS  # weights, gradients and both of Adam's moments, in float32
    half = workers("train.workers=2", "train.optimizer.type=adamw", on_gpu=False)
    assert 0.4 * one < half < one


def test_a_worker_with_a_gpu_holds_a_copy_of_the_state_and_what_is_offloaded() -> None:
    adam = "train.optimizer.type=adamw"
    plain = workers(adam, "train.workers=8", on_gpu=True)
    assert plain == pytest.approx(6 * GIB + 12 * PARAMETERS / 8, rel=1e-6)
    offloaded = workers(adam, "train.workers=8", "train.sharding.cpu_offload=true", on_gpu=True)
    assert offloaded - plain == pytest.approx(16 * PARAMETERS / 8, rel=1e-6)
    paged = workers("train.optimizer.type=paged_adamw", "train.workers=8", on_gpu=True)
    assert paged - plain == pytest.approx(8 * PARAMETERS / 8, rel=1e-6)


def test_every_worker_reads_all_weights_of_a_mixture_of_experts() -> None:
    mixtral = next(sizes for _, sizes in KNOWN if sizes.name == "Mixtral 8x7B")
    read = workers(on_gpu=True, sizes=mixtral) - workers(on_gpu=True, sizes=replace(mixtral, experts=0))
    assert read > 2 * mixtral.parameters


def test_adapters_alone_are_exported_without_the_model() -> None:
    merged = recipe("hermes_7b_dpo_lora", "train.lora.merge=true")
    alone = recipe("hermes_7b_dpo_lora", "train.lora.merge=false")
    assert export_bytes(merged, MISTRAL, on_gpu=True) == 2 * MISTRAL.parameters
    assert export_bytes(alone, MISTRAL, on_gpu=True) < 0.1 * MISTRAL.parameters


def test_an_engine_on_cpus_holds_the_model_and_one_with_gpus_does_not() -> None:
    zephyr = recipe("zephyr_7b_dpo", "model.dtype=auto")
    assert engine_bytes(zephyr, MISTRAL, on_gpu=False) > 4 * PARAMETERS
    two = recipe("zephyr_7b_dpo", "reference.tensor_parallel=2", "cluster.roles.reference.gpus=2")
    assert engine_bytes(two, MISTRAL, on_gpu=True) < 2 * PARAMETERS + 4 * GIB
    assert engine_bytes(two, MISTRAL, on_gpu=True) > engine_bytes(zephyr, MISTRAL, on_gpu=True)


def test_a_node_also_holds_ray_and_its_object_store() -> None:
    assert node_gib(0) == 3
    assert node_gib(12 * GIB) == 20  # (2 + 12) / 0.7
