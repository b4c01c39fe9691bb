"""Placement of a recipe's workers on its cluster.

This module fills in the hardware settings that the recipe does not set, and finds workers for which the cluster can
never have enough resources.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import ray
import yaml

from dpo_ray.artifacts.places import run_storage
from dpo_ray.config.recipe import Recipe
from dpo_ray.config.roles import RolesConfig
from dpo_ray.errors import InfrastructureError

from .node_groups import node_groups, totals_of, with_labels
from .requests import missing
from .resources import worker_resources
from .room import capacity, later_capacity, scales
from .session import session


def resolve_hardware(recipe: Recipe, *, verbose: bool = False) -> Recipe:
    """Return the recipe with hardware settings that suit the machine or the cluster where it runs.

    On a local Ray (this machine only), node labels are removed. On a cluster, training workers get GPUs if the nodes of
    the cluster have GPUs, or may have them later; the GPUs of the driver's machine do not matter. If the cluster names
    its groups of nodes, workers also get the labels of the group that is meant for them.

    Raises:
        InfrastructureError: the cluster does not answer, or it cannot be determined whether its nodes have GPUs.
    """
    roles = recipe.cluster.roles
    if recipe.ray.address == "local":
        return _with_roles(recipe, roles.without_labels())
    groups = node_groups()
    roles = with_labels(roles, groups)
    if roles.train.gpus is not None:
        return _with_roles(recipe, roles)
    with session(recipe, verbose=verbose):
        gpus = float(bool(later_capacity(worker_resources(roles.train, 1.0))))
        if not gpus and ((scales() and not groups) or _had_gpus(recipe)):
            raise InfrastructureError(
                "no node has a GPU for a training worker now, but the cluster may get one later or had one before",
                where=f"ray.address={recipe.ray.address}",
                fix="set cluster.roles.train.gpus=1 to wait for a GPU, or 0 to use CPUs",
            )
    train = roles.train.model_copy(update={"gpus": gpus})
    return _with_roles(recipe, roles.model_copy(update={"train": train}))


def _with_roles(recipe: Recipe, roles: RolesConfig) -> Recipe:
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"roles": roles})})


def check_room(
    recipe: Recipe, stages: Collection[str], train_gpus: float, engine_gpus: float, say: Callable[[str], None]
) -> None:
    """Check that the cluster has enough resources for the workers of the stages that have to run.

    If the cluster has too few resources, but an autoscaler or the groups of the cluster may add nodes, only report what
    the run waits for.

    Raises:
        InfrastructureError: the cluster can never have enough resources; the message says what is missing.
    """
    there, groups = ray.cluster_resources(), node_groups()
    lacks = [lack.what for lack in missing(recipe, stages, train_gpus, engine_gpus, capacity, there)]
    if lacks and (groups or scales()):
        most = {kind: max(amount, there.get(kind, 0.0)) for kind, amount in totals_of(groups).items()}
        never = missing(recipe, stages, train_gpus, engine_gpus, later_capacity, most) if groups else []
        if not never:
            say("the cluster is too small now, so the run waits until it has more nodes: " + "; ".join(lacks))
            return
        lacks = [lack.what for lack in never]
    if lacks:
        raise InfrastructureError(
            "the cluster can never hold what the recipe requests: " + "; ".join(lacks),
            where=f"ray.address={recipe.ray.address}",
            fix="add nodes with these labels and resources (a RayCluster: larger groups, applied again), or change cluster.roles",
        )


def _had_gpus(recipe: Recipe) -> bool:
    """Return whether an earlier attempt of this run trained on GPUs, according to the recipe.yaml that it wrote."""
    try:
        before = yaml.safe_load(run_storage(recipe).read_bytes("recipe.yaml"))
    except FileNotFoundError:
        return False
    return bool(before["cluster"]["roles"]["train"].get("gpus"))
