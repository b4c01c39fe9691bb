"""The number and size of the pods that a recipe needs, in groups of identical pods.

If the recipe's workers can never fit into the pods that it sets, an error says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_ray.capacity.host_memory import engine_bytes, export_bytes, node_gib, training_worker_bytes
from dpo_ray.capacity.model_sizes import known_sizes
from dpo_ray.capacity.workload import assumed_workload
from dpo_ray.cluster.node_groups import ROLE, NodeGroup
from dpo_ray.cluster.resources import judge_resources
from dpo_ray.config.cluster import GroupConfig, PlacementConfig
from dpo_ray.config.judge import replicas_of
from dpo_ray.config.objective import uses_reference
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError

WORKERS_PER_POD = 8  # at most, if the recipe does not set it: the usual number of GPUs in a node
MEMORY_GIB_PER_CPU, MEMORY_GIB_PER_GPU = 4, 64
CPUS_FOR_DATA = 4  # of a CPU pod, if the recipe does not set it


@dataclass(frozen=True)
class Demand:
    """Workers of one kind: the resources that each requests from Ray, their number, and their largest number."""

    what: str
    cpus: float
    gpus: float
    count: int
    most: int
    memory_bytes: float | None = None  # of one worker, if the planner knows it
    once_bytes: float = 0.0  # in addition, of one worker on each pod


@dataclass(frozen=True)
class PodGroup:
    """A group of identical pods: the size of one pod, and how many pods there are."""

    name: str
    labels: dict[str, str]
    cpus: int
    memory_gib: int
    gpus: int
    devices: dict[str, int]
    placement: PlacementConfig
    replicas: int
    min_replicas: int
    max_replicas: int


@dataclass(frozen=True)
class Gpus:
    """The GPUs of one training worker and of one engine.

    The recipe for the cluster contains both numbers, because its driver runs in a pod without a GPU, and could not
    detect the GPUs.
    """

    train: float
    engine: float


def gpus(recipe: Recipe) -> Gpus:
    """Return the GPUs of a training worker and of an engine.

    Numbers that the recipe does not set in cluster.roles depend on whether the pods in cluster.kubernetes have GPUs.
    """
    profile = recipe.cluster.kubernetes
    roles = recipe.cluster.roles
    train = roles.train.gpus
    if train is None:
        train = float(bool(profile.training.gpus))
    engine = roles.reference.gpus
    if engine is None:
        own = profile.engines.gpus if profile.engines is not None else None
        on_gpu = own > 0 if own is not None else train > 0
        engine = float(recipe.reference.tensor_parallel * on_gpu)
    return Gpus(train, engine)


def engine_labels(recipe: Recipe) -> dict[str, str]:
    """Return the labels of Ray nodes that engines request. By default, engines in training pods request no labels."""
    own = recipe.cluster.roles.reference.node_labels
    if own or recipe.cluster.kubernetes.engines is None:
        return dict(own)
    return {ROLE: "reference"}


def training_labels(recipe: Recipe) -> dict[str, str]:
    """Return the labels of Ray nodes that training workers request."""
    return {ROLE: "training"} | recipe.cluster.roles.train.node_labels


def groups(recipe: Recipe) -> list[PodGroup]:
    """Compute the number and the size of the pods in every group that the recipe needs.

    Raises:
        ConfigError: a worker does not fit into a pod, there are too few pods for all workers, or workers request labels
            that no pods have.
    """
    profile = recipe.cluster.kubernetes
    on_gpus, on_cpus = _judges(recipe)
    training = [_trainer(recipe)]
    engines = [*_engines(recipe), *on_gpus]
    _check_labels(recipe, on_gpus)
    cpu_labels = {ROLE: "cpu"} | _ours(dict(recipe.cluster.roles.prepare.node_labels))
    sized = [_sized(recipe, "cpu", cpu_labels, profile.cpu, [_data(profile.cpu), *on_cpus])]
    # Labels with the prefix ray.io/ are set by Ray itself, and it does not accept them from a recipe.
    labels, own = _ours(engine_labels(recipe)), _ours(training_labels(recipe))
    if profile.engines is None:
        side_by_side = recipe.reference.mode == "streaming" or recipe.online is not None
        sized.append(_sized(recipe, "training", labels | own, profile.training, training, engines, side_by_side))
        return sized
    if engines:
        sized.append(_sized(recipe, "engines", {ROLE: "reference"} | labels, profile.engines, engines))
    sized.append(_sized(recipe, "training", own, profile.training, training))
    return sized


def node_groups(recipe: Recipe) -> list[NodeGroup]:
    """Return the groups as a driver on the cluster sees them: what a node has for Ray, and how many there may be."""
    return [NodeGroup(g.name, g.cpus, g.gpus, g.memory_gib, g.labels, g.max_replicas) for g in groups(recipe)]


def _check_labels(recipe: Recipe, judges_on_gpus: list[Demand]) -> None:
    """Check that engines that sample, and judges, request only labels of the pods on which they run.

    Raises:
        ConfigError: an engine or a judge requests a label that these pods do not have.
    """
    roles, engines = recipe.cluster.roles, {ROLE: "reference"} | engine_labels(recipe)
    cpu = {ROLE: "cpu"} | dict(roles.prepare.node_labels)
    homes = {"sample": (roles.sample, engines), "judge": (roles.judge, engines if judges_on_gpus else cpu)}
    for name, (role, there) in homes.items():
        wanted = {k: v for k, v in (role.node_labels or {}).items() if not k.startswith("ray.io/")}
        if not wanted.items() <= there.items():
            raise ConfigError(
                f"no pods have these labels: {wanted}",
                where=f"cluster.roles.{name}.node_labels",
                fix=f"leave them out, or request some of {there}",
            )


def _ours(labels: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in labels.items() if not k.startswith("ray.io/")}


def _trainer(recipe: Recipe) -> Demand:
    cpus, workers = recipe.cluster.roles.train.cpus, recipe.train.workers
    each, sizes = gpus(recipe).train, known_sizes(recipe.model)
    if sizes is None:
        return Demand("a training worker", cpus, each, workers, workers)
    memory = training_worker_bytes(recipe, sizes, assumed_workload(recipe), on_gpu=each > 0)
    export = export_bytes(recipe, sizes, on_gpu=each > 0)
    return Demand("a training worker", cpus, each, workers, workers, memory, export)


def _engines(recipe: Recipe) -> list[Demand]:
    reference, roles = recipe.reference, recipe.cluster.roles
    scores = reference.engine == "vllm" and uses_reference(recipe.train.objective)
    count = reference.replicas if scores or recipe.online is not None else int(recipe.evaluate.sample_prompts > 0)
    most = max(count, reference.max_replicas or 0) if count else 0
    cpus = max(roles.reference.cpus, roles.sample.cpus or 0)
    each, sizes = gpus(recipe).engine, known_sizes(recipe.model)
    memory = None if sizes is None else engine_bytes(recipe, sizes, on_gpu=each > 0)
    return [Demand("an engine", cpus, each, count, most, memory)] if count else []


def _judges(recipe: Recipe) -> tuple[list[Demand], list[Demand]]:
    """Return two lists with the workers of judges: judges that use GPUs, and judges that do not."""
    role, demands = recipe.cluster.roles.judge, []
    for judge in recipe.online.named_judges().values() if recipe.online is not None else []:
        asks, count = judge_resources(judge, role), replicas_of(judge, role)
        demands.append(Demand(f"a {judge.type} judge", asks.cpus, asks.gpus, count, count))
    return [d for d in demands if d.gpus], [d for d in demands if not d.gpus]


def _data(group: GroupConfig) -> Demand:
    return Demand("the reading of data", group.cpus or CPUS_FOR_DATA, 0.0, group.replicas or 1, group.replicas or 1)


def _sized(
    recipe: Recipe,
    name: str,
    labels: dict[str, str],
    group: GroupConfig,
    demands: list[Demand],
    guests: Sequence[Demand] = (),
    side_by_side: bool = True,
) -> PodGroup:
    """Compute the number and the size of the pods in one group.

    Args:
        demands: The workers that these pods are for; all of them run at the same time.
        guests: Further workers that run on these pods: at the same time if `side_by_side`, otherwise before or after.
    """
    where = f"cluster.kubernetes.{name}"
    everyone = [*demands, *guests]
    cpus, gpu_count = _shape(group, everyone, where)
    needed = [_pods(d, cpus, gpu_count, d.count) for d in demands]
    growing = [_pods(d, cpus, gpu_count, d.most) for d in demands]
    own, grown = math.ceil(sum(needed)), math.ceil(sum(growing))
    if guests:
        visiting = sum(_pods(d, cpus, gpu_count, d.count) for d in guests)
        own = math.ceil(sum(needed) + visiting) if side_by_side else max(own, math.ceil(visiting))
        grown = own
    profile = recipe.cluster.kubernetes
    scales = profile.autoscaling and name != "training"
    replicas = group.replicas or own
    high = (group.max_replicas or max(replicas, grown)) if scales else replicas
    if high < own:
        field = "max_replicas" if scales and group.max_replicas else "replicas"
        raise ConfigError(
            f"{high} pods of {_size(cpus, gpu_count)} are too few: {_sum(everyone)} need {own}",
            where=f"{where}.{field}={high}",
            fix=f"set at least {own}, make the pods larger, or request less in the recipe",
        )
    low = (group.min_replicas or 0) if scales else replicas
    memory = group.memory_gib or _memory_gib(demands, guests, side_by_side, cpus, gpu_count)
    return PodGroup(
        name,
        labels,
        cpus,
        memory,
        gpu_count,
        dict(group.devices),
        group.placement,
        max(min(replicas, high), low),
        low,
        high,
    )


def _shape(group: GroupConfig, demands: list[Demand], where: str) -> tuple[int, int]:
    """Return the CPUs and GPUs of one pod.

    A number that the recipe does not set is chosen so that a whole number of workers fills the pod.

    Raises:
        ConfigError: a worker requests more than a pod has.
    """
    cpus, gpu_count = group.cpus or 0, group.gpus or 0
    for demand in demands:
        per_pod = min(demand.count, max(1, math.floor(WORKERS_PER_POD / (demand.gpus or 1))))
        if group.cpus is not None:
            per_pod = min(per_pod, math.floor(group.cpus / demand.cpus))
        if group.gpus is not None and demand.gpus:
            per_pod = min(per_pod, math.floor(group.gpus / demand.gpus))
        if per_pod < 1:
            lacking = "cpus" if group.cpus is not None and group.cpus < demand.cpus else "gpus"
            has = group.cpus if lacking == "cpus" else group.gpus
            asks = demand.cpus if lacking == "cpus" else demand.gpus
            raise ConfigError(
                f"{demand.what} requests {asks:g} {lacking[:-1].upper()}s, but a pod has {has}: the worker would wait forever",
                where=f"{where}.{lacking}={has}",
                fix=f"set at least {math.ceil(asks)}, or request less in the recipe",
            )
        if group.cpus is None:
            cpus = max(cpus, math.ceil(per_pod * demand.cpus))
        if group.gpus is None:
            gpu_count = max(gpu_count, math.ceil(per_pod * demand.gpus))
    return max(cpus, 1), gpu_count


def _memory_gib(
    demands: Sequence[Demand], guests: Sequence[Demand], side_by_side: bool, cpus: int, gpu_count: int
) -> int:
    """Return the memory of one pod: what the planner computes for as many workers as fit on it.

    A pod with GPUs has 64 GiB for each at least, as most nodes with GPUs have. If the memory of some workers is not
    known, a pod has 4 GiB for each CPU and 64 GiB for each GPU.
    """
    least = MEMORY_GIB_PER_GPU * gpu_count
    own, visiting = ([_bytes_on_pod(d, cpus, gpu_count) for d in each] for each in (demands, guests))
    if None in (*own, *visiting):
        return MEMORY_GIB_PER_CPU * cpus + least
    together = sum if side_by_side else max
    return max(node_gib(together((sum(filter(None, own)), sum(filter(None, visiting))))), least)


def _bytes_on_pod(demand: Demand, cpus: int, gpu_count: int) -> float | None:
    if demand.memory_bytes is None:
        return None
    return min(demand.most, _fits(demand, cpus, gpu_count)) * demand.memory_bytes + demand.once_bytes


def _fits(demand: Demand, cpus: int, gpu_count: int) -> int:
    """Return how many workers fit on one pod by their CPUs and GPUs."""
    fits = math.floor(cpus / demand.cpus)
    return min(fits, math.floor(gpu_count / demand.gpus)) if demand.gpus else fits


def _pods(demand: Demand, cpus: int, gpu_count: int, count: int) -> float:
    """Return how many pods `count` workers fill.

    A partly filled pod counts as a fraction, because other workers may use its free CPUs and GPUs.
    """
    fits = _fits(demand, cpus, gpu_count)
    full, rest = divmod(count, fits)
    return full + rest / fits


def _size(cpus: int, gpu_count: int) -> str:
    return f"{cpus} CPUs" + (f" and {gpu_count} GPUs" if gpu_count else "")


def _sum(demands: list[Demand]) -> str:
    return ", ".join(f"{d.count} x {d.what.split(' ', 1)[1]}" for d in demands)
