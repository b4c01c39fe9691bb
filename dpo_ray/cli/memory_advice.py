"""What the planner expects of workers that were killed for lack of memory."""

from __future__ import annotations

from dpo_ray.capacity.host_memory import engine_bytes, training_worker_bytes
from dpo_ray.capacity.model_sizes import model_sizes
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import DpoRayError, MemoryLimitError
from dpo_ray.observe.text import size
from dpo_ray.run.preflight import hardware

from .capacity_view import plan_if_possible, workload_of


def with_expectation(recipe: Recipe, error: MemoryLimitError) -> MemoryLimitError:
    """Return the error with what the planner expects of these workers, if it can compute that."""
    try:
        expected = _expected(recipe, error.where)
    except DpoRayError:  # the planner does not know the model
        expected = ""
    return MemoryLimitError(f"{error.what}{expected}", where=error.where, fix=error.fix)


def _expected(recipe: Recipe, where: str) -> str:
    found, sizes = hardware(recipe), model_sizes(recipe.model)
    if ".train" in where:
        plan, _ = plan_if_possible(recipe)
        each = training_worker_bytes(recipe, sizes, workload_of(recipe, plan), on_gpu=found.worker.gpus > 0)
        return f"; the planner expects {size(round(each))} for each of {recipe.train.workers} training workers"
    if ".engines" in where or ".reference" in where:
        each = engine_bytes(recipe, sizes, on_gpu=found.engine.gpus > 0)
        return f"; the planner expects {size(round(each))} for each engine"
    return ""
