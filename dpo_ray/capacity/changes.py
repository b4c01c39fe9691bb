"""Help for a recipe that does not fit on a cluster: changes to try, and the fewest nodes on which it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dpo_ray.config.load import validate_recipe
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError

from .fit import engine_on, gpus_beside, problems_of, training_on
from .hardware import Cluster
from .model_sizes import ModelSizes
from .workload import Workload

MOST_NODES = 1024


@dataclass(frozen=True)
class Change:
    """One possible change of the recipe, and the memory that a training rank needs with only this change."""

    overrides: str
    total_bytes: float
    fits: bool
    remark: str = ""


def changes_of(recipe: Recipe, sizes: ModelSizes, workload: Workload, cluster: Cluster) -> Iterator[Change]:
    """Yield changes of the recipe in the order to try them; changes that keep the result of training come first."""
    t, now = recipe.train, training_on(recipe, sizes, workload, cluster)
    free = max(1, cluster.gpus - gpus_beside(recipe))

    def tried(overrides: str, remark: str = "", **sections: dict[str, Any]) -> Iterator[Change]:
        if (other := _overridden(recipe, **sections)) is not None:
            training = training_on(other, sizes, workload, cluster)
            yield Change(overrides, training.memory.peak.total, training.fits, remark)

    if t.activation_checkpointing != "full":
        yield from tried("train.activation_checkpointing=full", train={"activation_checkpointing": "full"})
    if t.sharding.mode == "hybrid" and now.shard_ranks < now.workers:
        yield from tried(
            "train.sharding.mode=full train.sharding.shard_workers=null",
            sharding={"mode": "full", "shard_workers": None},
        )
    if free > now.workers:
        yield from tried(f"train.workers={free}", train={"workers": free})
    smaller = max(workload.longest_group_tokens, t.tokens_per_micro_batch // 2)
    if smaller < now.batches.tokens:
        yield from tried(f"train.tokens_per_micro_batch={smaller}", train={"tokens_per_micro_batch": smaller})
    if not now.batches.is_single_for_sure:
        larger = now.batches.most_tokens
        yield from tried(
            f"train.tokens_per_micro_batch={larger}",
            "one micro-batch per rank",
            train={"tokens_per_micro_batch": larger},
        )
        if t.groups_per_step > now.workers:
            yield from tried(
                f"train.groups_per_step={now.workers}",
                "one micro-batch per rank, but a smaller batch: the learning rate may have to be changed",
                train={"groups_per_step": now.workers},
            )
    if t.optimizer.type == "adamw":
        yield from tried("train.optimizer.type=adamw_8bit", optimizer={"type": "adamw_8bit"})
    if t.lora is None:
        yield from tried("train.lora.rank=16", "trains an adapter instead of all weights", train={"lora": {"rank": 16}})
    if not t.sharding.cpu_offload and t.quantization is None:
        yield from tried("train.sharding.cpu_offload=true", "slow", sharding={"cpu_offload": True})


def _overridden(recipe: Recipe, **sections: dict[str, Any]) -> Recipe | None:
    """Return a copy of the recipe with other values in `train`, `train.sharding` and `train.optimizer`.

    Return None if the copy is not a valid recipe.
    """
    values = recipe.model_dump(mode="json")
    train = values["train"]
    train |= sections.get("train", {})
    train["sharding"] |= sections.get("sharding", {})
    train["optimizer"] |= sections.get("optimizer", {})
    try:
        return validate_recipe(values, where=recipe.name)
    except ConfigError:
        return None


def nearest_that_fits(recipe: Recipe, sizes: ModelSizes, workload: Workload, cluster: Cluster) -> Cluster | None:
    """Return the smallest cluster with the same kind of nodes on which the recipe fits, or None if there is none.

    Training uses all GPUs that the engines leave free.
    """

    def fits(nodes: int) -> bool:
        other = replace(cluster, nodes=nodes)
        workers = other.gpus - gpus_beside(recipe)
        if workers < 1:
            return False
        shard = recipe.train.sharding.shard_workers
        sharding = {} if shard is None or workers % shard == 0 else {"mode": "full", "shard_workers": None}
        changed = _overridden(recipe, train={"workers": workers}, sharding=sharding)
        if changed is None:
            return False
        training = training_on(changed, sizes, workload, other)
        return not problems_of(changed, sizes, other, training, engine_on(changed, sizes, other))

    return _first(fits, cluster)


def _first(fits: Callable[[int], bool], cluster: Cluster) -> Cluster | None:
    """Return the first cluster that fits, of clusters with 1 to 64, then 128, 256, ... nodes; None if there is none.

    All numbers of nodes are tried in order, because a rank does not always need less memory on more nodes.
    """
    counts = [*range(1, 65), *(2**i for i in range(7, MOST_NODES.bit_length()))]
    return next((replace(cluster, nodes=n) for n in counts if fits(n)), None)
