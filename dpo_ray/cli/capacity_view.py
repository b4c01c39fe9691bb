"""The output of `dpo-ray plan --cluster`: what a recipe needs on a cluster, for a terminal and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_ray.capacity.answer import Capacity, work_out
from dpo_ray.capacity.hardware import parse_cluster
from dpo_ray.capacity.model_sizes import model_sizes
from dpo_ray.capacity.sample import sampled_workload
from dpo_ray.capacity.workload import Workload, assumed_workload, measured_workload
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError, InfrastructureError
from dpo_ray.observe.text import harmless
from dpo_ray.run.planning import Plan, found, make_plan

PARTS = {
    "weights": "weights, float32 shards",
    "optimizer": "optimizer state",
    "gradients": "gradients, float32 shards",
    "whole_gradients": "whole gradients of earlier micro-batches",
    "gathered": "gathered weights (root and two blocks)",
    "activations": "activations kept for the backward pass",
    "logits": "logits of one chunk",
    "work": "the block or head being computed",
}


def capacity_of(recipe: Recipe, cluster: str, plan: Plan | None = None) -> Capacity:
    """Compute what a recipe needs on a cluster such as `4x8xH100`.

    Args:
        plan: The plan of the recipe, or None if its inputs are not accessible. With a plan, lengths are measured on the
            prepared tokens or on a sample; without, they are assumed.

    Raises:
        ConfigError: the text is not a cluster, the GPU is unknown, or the model's sizes cannot be found on this
            machine.
    """
    return work_out(recipe, model_sizes(recipe.model), workload_of(recipe, plan), parse_cluster(cluster))


def plan_if_possible(recipe: Recipe) -> tuple[Plan | None, str]:
    """Return the plan of a recipe's stages and ""; or None and the reason if this machine has no access to its inputs."""
    try:
        return make_plan(recipe), ""
    except (ConfigError, InfrastructureError) as error:
        return None, f"{error.where}: {error.what}" if error.where else error.what


def workload_of(recipe: Recipe, plan: Plan | None) -> Workload:
    """Return the amount of data: measured on the prepared tokens or on a sample, or else assumed."""
    tokens = None if plan is None else found(plan, "prepare")
    statistics = {} if tokens is None else tokens.manifest.figures["statistics"].get("train", {})
    if any(part["groups"] for part in statistics.values()):
        return measured_workload(recipe, statistics)
    sampled = None if plan is None else sampled_workload(recipe, plan)
    return sampled or assumed_workload(recipe)


def figures(capacity: Capacity) -> dict[str, Any]:
    """Return the result of the planner as values for JSON, in bytes, seconds and operations."""
    training = capacity.training
    return {
        "cluster": str(capacity.cluster),
        "fits": capacity.fits,
        "problems": list(capacity.problems),
        "remarks": list(capacity.remarks),
        "nearest": None if capacity.nearest is None else str(capacity.nearest),
        "parameters": capacity.sizes.parameters,
        "trained_parameters": capacity.trained_parameters,
        "active_parameters": capacity.sizes.active_parameters,
        "workload": dataclasses.asdict(capacity.workload),
        "steps": capacity.steps,
        "workers": training.workers,
        "shard_ranks": training.shard_ranks,
        "micro_batches": dataclasses.asdict(training.batches),
        "rank_bytes": dataclasses.asdict(training.memory.peak) | {"total": training.memory.peak.total},
        "rank_moment": training.memory.moment,
        "rank_host_bytes": training.memory.host_bytes,
        "room_bytes": training.room_bytes,
        "engine_bytes": None if capacity.engine is None else dataclasses.asdict(capacity.engine),
        "changes": [dataclasses.asdict(change) for change in capacity.changes],
        "stages": [dataclasses.asdict(stage) for stage in capacity.stages],
        "traffic_bytes": dataclasses.asdict(capacity.traffic),
        "storage_bytes": dataclasses.asdict(capacity.storage),
    }


def print_capacity(capacity: Capacity, console: Console) -> None:
    """Print whether the recipe fits, then memory, time, traffic and storage, and what to change if it does not fit."""
    _say(console, _verdict(capacity), "bold green" if capacity.fits else "bold red")
    for problem in capacity.problems:
        _say(console, f"  {problem}")
    if not capacity.fits:
        nearest = "none of up to 1,024 nodes" if capacity.nearest is None else str(capacity.nearest)
        _say(console, f"  the smallest cluster of such nodes that fits: {nearest}")
    sizes, workload = capacity.sizes, capacity.workload
    active = f", {_billions(sizes.active_parameters)} of them active for each token" if sizes.experts else ""
    trained = f", {_billions(capacity.trained_parameters)} trained" if capacity.recipe.train.lora else ""
    _say(console, f"model: {sizes.name}, {_billions(sizes.parameters)} parameters{active}{trained}")
    _say(
        console,
        f"data: {workload.groups:,} groups of {workload.group_tokens:,.0f} tokens on average (prompt {workload.prompt_tokens:,.0f}, "
        f"completion {workload.completion_tokens:,.0f}), {capacity.steps:,} steps; from {workload.source}",
    )
    for remark in capacity.remarks:
        _say(console, f"note: {remark}")
    training = capacity.training
    _say(
        console,
        f"a training rank at its peak, {training.memory.moment}, with {training.batches.tokens:,} tokens:",
        "bold",
    )
    console.print(_memory_table(capacity))
    if capacity.changes:
        _say(console, "changes to try, each on its own:", "bold")
        console.print(_changes_table(capacity))
    if (engine := capacity.engine) is not None:
        _say(
            console,
            f"engine, on each of its {capacity.recipe.reference.tensor_parallel} GPU(s): weights {_gb(engine.weights)}, a step of "
            f"{engine.step_tokens:,} tokens {_gb(engine.step)}, prompt logits {_gb(engine.logits)}, KV cache {_gb(engine.kv_cache)} "
            f"({engine.kv_tokens:,} tokens)",
        )
    _say(
        console,
        "time, estimated by a roofline model, without the start-up of workers and engines, judges and storage:",
        "bold",
    )
    console.print(_time_table(capacity))
    sent, stored = capacity.traffic, capacity.storage
    _say(
        console,
        f"each rank receives per step: weights {_gb(sent.gathered)}, gradients {_gb(sent.reduced)}, "
        f"between copies {_gb(sent.replicated)}: {sent.seconds:.2f} s",
    )
    _say(
        console,
        f"storage, at most: tokens {_gb(stored.tokens)}, reference {_gb(stored.reference)}, schedule {_gb(stored.schedule)}, "
        f"checkpoints {_gb(stored.checkpoints)}, policy {_gb(stored.policy)}",
    )


def _verdict(capacity: Capacity) -> str:
    training = capacity.training
    word = "fits" if capacity.fits else "does NOT fit"
    return (
        f"{capacity.recipe.name} {word} on {capacity.cluster}: {_gb(training.memory.peak.total)} of {_gb(training.room_bytes)} "
        f"on each of {training.workers} training GPUs"
    )


def _memory_table(capacity: Capacity) -> Table:
    memory, table = capacity.training.memory, _table("what", "memory")
    for name, words in PARTS.items():
        if value := getattr(memory.peak, name):
            table.add_row(words, _gb(value))
    table.add_row("total", _gb(memory.peak.total), style="bold")
    if memory.host_bytes:
        table.add_row("in CPU memory", _gb(memory.host_bytes))
    return table


def _changes_table(capacity: Capacity) -> Table:
    table = _table("change", "memory", "", "remark")
    for change in capacity.changes:
        fits = Text("fits", "green") if change.fits else Text("no", "red")
        table.add_row(Text(change.overrides), _gb(change.total_bytes), fits, Text(change.remark))
    return table


def _time_table(capacity: Capacity) -> Table:
    table = _table("stage", "10^15 operations", "time", "bound by")
    for stage in capacity.stages:
        table.add_row(stage.stage, f"{stage.flops / 1e15:,.1f}", _rounded_duration(stage.seconds), stage.bound)
    table.add_row("total", "", _rounded_duration(sum(s.seconds for s in capacity.stages)), "", style="bold")
    return table


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in ("memory", "10^15 operations", "time") else "left")
    return table


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(harmless(text), style), soft_wrap=True)


def _gb(value: float) -> str:
    return f"{value / 1e9:,.1f} GB" if value >= 1e8 or not value else f"{value / 1e6:,.1f} MB"


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _rounded_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
