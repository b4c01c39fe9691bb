"""Roles on the cluster that a recipe names: what it leaves to the cluster, and what the cluster can never hold."""

from __future__ import annotations

from collections.abc import Collection

import ray

from dpo_ray.config.recipe import Recipe
from dpo_ray.config.roles import RoleConfig
from dpo_ray.errors import InfrastructureError

from .room import Ask, capacity, capacity_to_come
from .session import session
from .workers import worker_ask


def placed(recipe: Recipe, *, verbose: bool = False) -> Recipe:
    """Say in the recipe what it leaves to where it runs.

    On a Ray of this machine alone labels of nodes do not count. On a cluster, workers have GPUs if its nodes do, whatever
    the driver's machine has.

    Raises:
        InfrastructureError: the cluster does not answer.
    """
    if recipe.ray.address == "local":
        roles = recipe.cluster.roles
        free = {
            name: getattr(roles, name).model_copy(update={"node_labels": None}) for name in type(roles).model_fields
        }
        cluster = recipe.cluster.model_copy(update={"roles": roles.model_copy(update=free)})
        reference, train = (s.model_copy(update={"node_labels": {}}) for s in (recipe.reference, recipe.train))
        return recipe.model_copy(update={"cluster": cluster, "reference": reference, "train": train})
    if recipe.train.gpus_per_worker is not None:
        return recipe
    with session(recipe, verbose=verbose):
        t = recipe.train
        one = Ask("training workers", t.cpus_per_worker, 1.0, t.memory_gib_per_worker, t.node_labels)
        gpus = float(bool(capacity(one) or capacity_to_come(one)))
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"gpus_per_worker": gpus})})


def check_room(recipe: Recipe, stages: Collection[str], train_gpus: float, engine_gpus: float) -> None:
    """See that the cluster can hold each role of the stages that are to run, now or when it has scaled up.

    Raises:
        InfrastructureError: it never can; says what is missing.
    """
    missing = []
    for ask, least in _asks(recipe, stages, train_gpus, engine_gpus):
        now, to_come = capacity(ask), capacity_to_come(ask)
        if max(now, to_come or 0) < least:
            there = f"{now}" if to_come is None else f"{now}, and {to_come} when it has scaled up"
            missing.append(f"{least} {ask.what} are asked for, each {ask.words()}, and there is room for {there}")
    cpus = ray.cluster_resources().get("CPU", 0.0)
    one_cpu = capacity_to_come(Ask("", 1.0))
    if max(cpus, one_cpu or 0) < recipe.cpus_needed():
        missing.append(
            f"the run's widest moment asks for {recipe.cpus_needed()} CPUs at once, and the cluster has {cpus:g}"
        )
    if missing:
        raise InfrastructureError(
            "the cluster can never hold what the recipe asks for: " + "; ".join(missing),
            where=f"ray.address={recipe.ray.address}",
            fix="add nodes with these labels and resources, or change cluster.roles",
        )


def _asks(recipe: Recipe, stages: Collection[str], train_gpus: float, engine_gpus: float) -> list[tuple[Ask, int]]:
    """List what the roles of stages ask for, and how many each must have at least: of a pool of engines one will do."""
    r, t, roles = recipe.reference, recipe.train, recipe.cluster.roles
    asks: list[tuple[Ask, int]] = []
    if "train" in stages or ("reference" in stages and r.engine == "trainer"):
        asks.append((worker_ask(t, train_gpus), t.min_workers or t.workers))
    engine = Ask("engines", r.cpus_per_replica, engine_gpus, r.memory_gib_per_replica, r.node_labels)
    if r.engine == "vllm" and ("reference" in stages or recipe.online is not None):
        asks.append((engine, 1))
    if "evaluate" in stages and recipe.evaluate.sample_prompts and recipe.online is None:
        asks.append((sampler_ask(recipe, engine_gpus), 1 if engine_gpus else 2))
    if recipe.online is not None:
        asks.append((_of(roles.judge, "judges"), 1))
    asks.append((_of(roles.prepare, "tasks on CPUs"), 1))
    return asks


def sampler_ask(recipe: Recipe, engine_gpus: float) -> Ask:
    """Say what an engine that samples for an evaluation asks for."""
    role, r = recipe.cluster.roles.sample, recipe.reference
    return Ask(
        "engines that sample",
        role.cpus or r.cpus_per_replica,
        engine_gpus if role.gpus is None else role.gpus,
        role.memory_gib or r.memory_gib_per_replica,
        r.node_labels if role.node_labels is None else role.node_labels,
    )


def _of(role: RoleConfig, what: str) -> Ask:
    return Ask(what, role.cpus or 1.0, role.gpus or 0.0, role.memory_gib, role.node_labels or {})
