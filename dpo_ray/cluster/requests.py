"""What the stages of a recipe request at the same time, and what nodes lack for it. Imports no Ray, so that a recipe is
checked against this machine without a start."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from dpo_ray.config.recipe import Recipe

from .resources import Resources, engine_resources, judge_resources, sampler_resources, worker_resources


class Lack(NamedTuple):
    """What nodes lack, in words, and the section of the recipe that requests it."""

    field: str
    what: str


def local_cpus(recipe: Recipe) -> int:
    """Return the number of CPUs to offer on this machine: its cores, but at least the recipe's peak need.

    Ray uses CPUs to count what may run at once; more of them than cores only means that processes share.
    """
    return recipe.ray.cpus or max(os.cpu_count() or 1, recipe.cpus_needed())


def local_memory_bytes() -> int:
    """Return the memory to offer on this machine, which is all of it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def missing_here(
    recipe: Recipe, stages: Collection[str], train_gpus: float, engine_gpus: float, gpus: int
) -> list[Lack]:
    """Return what this machine can never hold of the stages of a recipe, as a local Ray would count it.

    Args:
        gpus: the GPUs of this machine.
    """
    here = {"CPU": float(local_cpus(recipe)), "GPU": float(gpus), "memory": float(local_memory_bytes())}
    return missing(recipe, stages, train_gpus, engine_gpus, lambda request: fitting(request, here), here)


def missing(
    recipe: Recipe,
    stages: Collection[str],
    train_gpus: float,
    engine_gpus: float,
    capacity: Callable[[Resources], int],
    there: Mapping[str, float],
) -> list[Lack]:
    """Return what can never be held of the stages of a recipe.

    Args:
        capacity: counts the workers that the nodes could hold if nothing else ran on them.
        there: the resources of all nodes together.
    """
    lacks = []
    for role, request, least in _requests(recipe, stages, train_gpus, engine_gpus):
        if (now := capacity(request)) < least:
            what = f"{least} {request.what} are needed (each: {request.describe()}), and there is room for {now}"
            lacks.append(Lack(f"cluster.roles.{role}", what))
    wanted = {"CPU": recipe.least_cpus(), "GPU": _least_gpus(recipe, stages, train_gpus, engine_gpus)}
    for kind, amount in wanted.items():
        if (held := there.get(kind, 0.0)) < amount:
            what = f"the run needs {amount:g} {kind}s at once at its peak, and the cluster has {held:g}"
            lacks.append(Lack("cluster.roles", what))
    return lacks


def _requests(
    recipe: Recipe, stages: Collection[str], train_gpus: float, engine_gpus: float
) -> list[tuple[str, Resources, int]]:
    """List each role of the stages, what it requests, and the minimum count: for a pool of engines it is one."""
    r, t, roles = recipe.reference, recipe.train, recipe.cluster.roles
    listed: list[tuple[str, Resources, int]] = []
    if "train" in stages or ("reference" in stages and r.engine == "trainer"):
        listed.append(("train", worker_resources(roles.train, train_gpus), t.min_workers or t.workers))
    if r.engine == "vllm" and ("reference" in stages or recipe.online is not None):
        listed.append(("reference", engine_resources(roles.reference, engine_gpus), 1))
    if "evaluate" in stages and recipe.evaluate.sample_prompts and recipe.online is None:
        listed.append(("sample", sampler_resources(roles, engine_gpus), 1))
    if recipe.online is not None:
        listed += [("judge", judge_resources(judge, roles.judge), 1) for judge in recipe.online.named_judges().values()]
    prepare = roles.prepare
    listed.append(("prepare", Resources("tasks", prepare.cpus, 0.0, prepare.memory_gib, prepare.node_labels), 1))
    return listed


def _least_gpus(recipe: Recipe, stages: Collection[str], train_gpus: float, engine_gpus: float) -> float:
    """Return the number of GPUs without which scoring and training, which run concurrently, would wait for ever."""
    if recipe.reference.mode != "streaming" or "train" not in stages or "reference" not in stages:
        return 0.0
    return (recipe.train.min_workers or recipe.train.workers) * train_gpus + engine_gpus


def fitting(request: Resources, resources: Mapping[str, float]) -> int:
    """Count the workers that a node with these resources could hold."""
    return min(math.floor(resources.get(name, 0.0) / amount + 1e-9) for name, amount in request.as_ray.items())
