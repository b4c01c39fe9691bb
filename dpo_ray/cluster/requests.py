"""The resources that the stages of a recipe request at the same time, and which of them the nodes do not have.

This module does not import Ray, so a recipe can be checked against this machine without starting Ray.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from dpo_ray.config.recipe import Recipe

from .resources import Resources, engine_resources, judge_resources, sampler_resources, worker_resources


class Lack(NamedTuple):
    """A lack of resources: `what` describes it in words, `field` is the section of the recipe that requests them."""

    field: str
    what: str


def local_cpus(recipe: Recipe) -> int:
    """Return the number of CPUs that a local Ray offers; by default all cores, or more if the recipe needs more.

    Ray uses the number of CPUs only to decide how many processes may run at once. If it offers more CPUs than cores,
    processes share the cores.
    """
    return recipe.ray.cpus or max(os.cpu_count() or 1, recipe.cpus_needed())


def local_memory_bytes() -> int:
    """Return the memory that a local Ray offers: all memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def missing_here(
    recipe: Recipe, stages: Collection[str], train_gpus: float, engine_gpus: float, gpus: int
) -> list[Lack]:
    """List the resources that the stages of a recipe need and this machine lacks, counted as a local Ray counts them.

    Args:
        gpus: the number of GPUs of this machine.
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
    """List the resources that the stages of a recipe need and the nodes lack, even if nothing else runs on the nodes.

    Args:
        capacity: returns how many workers with a request fit on the nodes if nothing else runs there.
        there: the total resources of all nodes.
    """
    lacks = []
    for role, request, least in _requests(recipe, stages, train_gpus, engine_gpus):
        if (now := capacity(request)) < least:
            what = f"{least} {request.what} are needed (each: {request.describe()}), but the nodes can hold only {now}"
            lacks.append(Lack(f"cluster.roles.{role}", what))
    wanted = {"CPU": recipe.least_cpus(), "GPU": _least_gpus(recipe, stages, train_gpus, engine_gpus)}
    for kind, amount in wanted.items():
        if (held := there.get(kind, 0.0)) < amount:
            what = f"the run needs up to {amount:g} {kind}s at the same time, but the cluster has {held:g}"
            lacks.append(Lack("cluster.roles", what))
    return lacks


def _requests(
    recipe: Recipe, stages: Collection[str], train_gpus: float, engine_gpus: float
) -> list[tuple[str, Resources, int]]:
    """List what the workers of each role request, as (role, request of one worker, smallest number of workers).

    For engines and for judges the smallest number is 1, because one engine or one judge is enough to make progress.
    """
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
    """Return the fewest GPUs with which scoring and training can run concurrently; 0 if they run in turn."""
    if recipe.reference.mode != "streaming" or "train" not in stages or "reference" not in stages:
        return 0.0
    return (recipe.train.min_workers or recipe.train.workers) * train_gpus + engine_gpus


def fitting(request: Resources, resources: Mapping[str, float]) -> int:
    """Return how many workers with this request fit on a node with these resources."""
    return min(math.floor(resources.get(name, 0.0) / amount + 1e-9) for name, amount in request.as_ray.items())
