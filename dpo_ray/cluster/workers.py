"""Run one function on a group of training workers: Ray Train starts them, and starts them again where one dies."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray.config.train import TrainConfig
from dpo_ray.errors import DpoRayError, TrainError

from .inbox import Inbox


def start_inbox() -> Any:
    """Start an inbox on the driver's node; it ends with the driver, and with no other node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Inbox).options(num_cpus=0, scheduling_strategy=here).remote()


def run_workers(
    function: Callable[[dict[str, Any]], Any],
    task: Any,
    config: TrainConfig,
    gpus_per_worker: float,
    *,
    name: str,
    where: str,
    goes_on: str,
) -> Any:
    """Call `function({"task": task})` on every worker of `config`, in one process group; returns what rank 0 returned.

    Each call is a Ray Train run of its own (`name` is unique), so Ray's own snapshot is never the truth: what our workers
    commit is.

    Raises:
        TrainError: the workers failed more often than config.max_failures allows. `where` is the stage, `goes_on` says
            from where the same command goes on.
        DpoRayError: what a worker raised.
    """
    from ray.train.torch import (
        TorchConfig,
        TorchTrainer,
    )  # they load torch, and not everybody who imports this module trains

    resources = {"CPU": config.cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})}
    with tempfile.TemporaryDirectory(prefix="dpo-ray-workers-", ignore_cleanup_errors=True) as scratch:
        trainer = TorchTrainer(
            function,
            train_loop_config={"task": task},
            scaling_config=ScalingConfig(
                num_workers=config.workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources
            ),
            # What a rank waits for another; both backends, as sharded CPU tensors and objects are exchanged beside GPU work.
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if gpus_per_worker else "gloo", timeout_s=math.ceil(config.hang_seconds)
            ),
            run_config=RunConfig(
                name=name,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        try:
            return trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            cause = first_cause(error)
            if isinstance(cause, DpoRayError):
                raise cause from error
            raise TrainError(
                f"the workers failed: {type(cause).__name__}: {cause}",
                where=where,
                fix=f"mend the cause and run the same command: it goes on {goes_on}; --verbose shows the workers' logs",
            ) from error


def first_cause(error: ray.train.TrainingFailedError) -> BaseException:
    """Find what a worker raised, under the wrappings of Ray Train; a worker that died by itself has none."""
    failures = getattr(error, "worker_failures", {})
    cause = next(iter(failures.values()), error)
    return getattr(cause, "_base_exc", cause)
