"""The memory of machines that workers are expected to need, and how an error of a killed worker quotes it."""

from __future__ import annotations

import re

from dpo_ray.capacity.host import WORKER_BYTES, engine_host_bytes, worker_host_bytes
from dpo_ray.capacity.model_sizes import model_sizes
from dpo_ray.capacity.workload import assumed_workload
from dpo_ray.cli.memory_advice import with_expectation
from dpo_ray.config.load import validate_recipe
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import MemoryLimitError
from tests.helpers.good_recipe import GOOD


def recipe(**train: object) -> Recipe:
    return validate_recipe({**GOOD, "train": train, "cluster": {"roles": {"train": {"gpus": 0}}}}, where="a test")


def test_on_cpus_a_worker_holds_the_whole_step_and_on_gpus_only_what_is_offloaded() -> None:
    made, sizes = recipe(workers=1), model_sizes(recipe().model)
    workload = assumed_workload(made)
    on_cpu = worker_host_bytes(made, sizes, workload, 4, on_gpu=False)
    assert on_cpu > WORKER_BYTES + 16 * sizes.parameters, "weights, gradients and two moments in float32"
    assert worker_host_bytes(made, sizes, workload, 2, on_gpu=True) == WORKER_BYTES
    offloaded = recipe(workers=1, sharding={"cpu_offload": True})
    assert worker_host_bytes(offloaded, sizes, workload, 2, on_gpu=True) >= WORKER_BYTES + 16 * sizes.parameters


def test_more_workers_share_the_model() -> None:
    sizes = model_sizes(recipe().model)
    one, four = (
        worker_host_bytes(made, sizes, assumed_workload(made), 4, on_gpu=False)
        for made in (recipe(workers=1), recipe(workers=4))
    )
    assert one - four > 8 * sizes.parameters


def test_an_engine_on_cpus_holds_the_model_and_its_cache() -> None:
    made, sizes = recipe(), model_sizes(recipe().model)
    on_cpu = engine_host_bytes(made, sizes, 4, on_gpu=False)
    assert on_cpu - engine_host_bytes(made, sizes, 4, on_gpu=True) >= 4 * sizes.parameters + (256 << 20)


def test_the_error_quotes_the_expectation() -> None:
    for field, words in (("training", r"for each of \d+ training workers"), ("engines", "for each engine")):
        where = f"cluster.kubernetes.{field}.memory_gib"
        error = with_expectation(recipe(), MemoryLimitError("killed", where=where, fix="raise it"))
        assert re.fullmatch(rf"killed; the planner expects [\d.]+ [GM]iB {words}", error.what)
        assert (error.where, error.fix) == (where, "raise it")
    assert (
        with_expectation(recipe(), MemoryLimitError("killed", where="cluster.kubernetes.cpu.memory_gib")).what
        == "killed"
    )
