"""Groups of training workers: Ray Train runs one function on all workers, and all start again if a worker is lost."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray.config.train import TrainConfig
from dpo_ray.errors import DpoRayError, StoppedError, StorageFailedError, WorkersLostError

from .inbox import Inbox
from .memory_losses import lack_of_memory
from .resources import Resources
from .room import given_back, has_room, wait
from .worker_logs import save_after_a_loss

logger = logging.getLogger(__name__)
GROW_SECONDS = 30.0  # between two checks for free resources for missing workers
LONGEST = 600  # characters of a cause in an error: what Ray says of a dead worker goes on for screens


def start_inbox() -> Any:
    """Start an inbox on the driver's node, so that it lives as long as the driver, even if other nodes are lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Inbox).options(num_cpus=0, scheduling_strategy=here).remote()


def run_workers(
    function: Callable[[dict[str, Any]], Any],
    task: Any,
    config: TrainConfig,
    request: Resources,
    *,
    name: str,
    where: str,
    goes_on: str,
    say: Callable[[str], None] = logger.warning,
    pause: Callable[[], None] | None = None,
    gives_up: Callable[[], bool] = lambda: False,
    may_start: Callable[[], object] = lambda: None,
) -> Any:
    """Call `function({"task": task})` on every worker of `config`, in one process group; return what rank 0 returned.

    The group has `config.workers` workers, or as few as `config.min_workers` while the cluster has no resources for
    more. If a worker is lost, alone or with its node, all workers start again, as many as the cluster then has
    resources for. Each attempt is a separate Ray Train run with a new name. So an attempt never continues from Ray's
    own snapshot, but from what the workers have committed.

    Args:
        request: what each worker requests from Ray.
        say: reports lost workers, and what the run waits for.
        pause: called when the cluster has resources for more workers than the group has. It requests the workers to
            save their state and return a result whose `error` is a StoppedError. Then a larger group starts. None: the
            group never grows.
        gives_up: called after a worker is lost, and while the run waits for resources. True: end instead of starting
            again.
        may_start: called before each start. It raises an error if another driver has taken over the run, whose workers
            this driver would otherwise replace.

    Raises:
        StoppedError: `gives_up` returned True while the run waited for resources.
        WorkersLostError: the workers failed more often than config.max_failures allows. Its text has `where`, the name of the
            stage, and `goes_on`, which says from where the same command continues.
        DpoRayError: the error that a worker raised.
    """
    failures, patience_seconds = 0, None
    for attempt in itertools.count(1):
        workers = wait(request, config.min_workers or config.workers, config.workers, say, gives_up, patience_seconds)
        patience_seconds = None
        may_start()
        with _watch_for_room(request, pause if workers < config.workers else None) as paused:
            result = _attempt(function, task, config, request, workers, f"{name}-{attempt}")
        if isinstance(result, _Loss):
            save_after_a_loss()
            failures += not result.is_of_the_cluster
            if may_mend(result.cause) and failures <= config.max_failures and not gives_up():
                say(f"training workers were lost ({_line(result.cause)}): all workers start again {goes_on}")
                continue
            if isinstance(result.cause, DpoRayError):
                raise result.cause
            if (lack := lack_of_memory(request.what, "train", result.cause)) is not None:
                raise lack from result.cause
            raise WorkersLostError(
                f"the workers failed: {type(result.cause).__name__}: {' '.join(str(result.cause).split())[:LONGEST]}",
                where=where,
                fix=f"fix the cause and run the same command: it continues {goes_on}; --verbose shows the workers' logs",
            ) from result.cause
        stopped = isinstance(result, dict) and isinstance(result.get("error"), StoppedError)
        if gives_up() or not (paused.is_set() and stopped):
            return result
        patience_seconds = 0.0  # the resources are free now, and other programs may take them
        say("there are free resources for more training workers: all workers start again")
    raise AssertionError  # itertools.count never ends


@dataclass(frozen=True)
class _Loss:
    """The failure of an attempt. `cause` is without its traceback, which would keep Ray's controller alive."""

    cause: BaseException
    is_of_the_cluster: bool  # a preempted machine, or too few resources after all: not the workers' fault


def _attempt(
    function: Callable[[dict[str, Any]], Any],
    task: Any,
    config: TrainConfig,
    request: Resources,
    workers: int,
    name: str,
) -> Any:
    """Run the workers once, until they end or a worker is lost; return what rank 0 returned, or the loss."""
    # Imported here because they load torch, which not every importer of this module needs.
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory(prefix="dpo-ray-workers-", ignore_cleanup_errors=True) as scratch:
        trainer = TorchTrainer(
            function,
            train_loop_config={"task": task},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=request.gpus > 0,
                resources_per_worker=request.as_ray,
                label_selector=dict(request.labels) or None,
            ),
            # `timeout_s` limits how long a rank waits for another. With GPUs both backends are needed, as sharded CPU
            # tensors and objects are exchanged besides GPU work.
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if request.gpus else "gloo", timeout_s=math.ceil(config.hang_seconds)
            ),
            run_config=RunConfig(
                name=name,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            ),
        )
        try:
            with given_back(request, workers), _own_interrupt():
                return trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            return _Loss(first_cause(error).with_traceback(None), _is_of_the_cluster(error))


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Restore the handler of Ctrl-C on exit, because Ray Train replaces it.

    Ray Train's handler keeps a reference to Ray Train's controller, so the workers' resources would stay reserved.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _watch_for_room(request: Resources, pause: Callable[[], None] | None) -> Iterator[threading.Event]:
    """Check in a thread whether one more worker could start; if so, set the yielded event and call `pause`.

    If `pause` is None, check nothing.
    """
    paused, end = threading.Event(), threading.Event()

    def look() -> None:
        while pause is not None and not end.wait(GROW_SECONDS):
            try:
                if has_room(request, 1):
                    paused.set()
                    pause()
            except ray.exceptions.RayError:  # the run is ending, and Ray with it
                return

    thread = threading.Thread(target=look, name="room-for-more", daemon=True)
    thread.start()
    try:
        yield paused
    finally:
        end.set()
        thread.join()


def first_cause(error: ray.train.TrainingFailedError) -> BaseException:
    """Return the error that a worker raised, without Ray Train's wrappers, or Ray's error if a worker process died.

    If several workers failed, return a DpoRayError if there is one, because the other workers only lost their
    connection to that worker.
    """
    if isinstance(error, ray.train.ControllerError):  # for example, a worker did not start
        failure = error.controller_failure
        return getattr(failure, "cause", None) or failure
    failures = getattr(error, "worker_failures", {}).values()
    causes = [getattr(failure, "_base_exc", failure) for failure in failures] or [error]
    return next((cause for cause in causes if isinstance(cause, DpoRayError)), causes[0])


def may_mend(cause: BaseException) -> bool:
    """Return whether the workers may succeed when they start again; the client of an object store has tried enough."""
    return not (isinstance(cause, DpoRayError) and (cause.is_final or isinstance(cause, StorageFailedError)))


def _is_of_the_cluster(error: ray.train.TrainingFailedError) -> bool:
    if isinstance(error, ray.train.PreemptionError):
        return True
    if isinstance(error, ray.train.ControllerError):
        return type(error.controller_failure).__name__ == "WorkerGroupStartupTimeoutError"
    losses = getattr(error, "worker_failures", {}).values()
    return any(getattr(lost, "preempted", False) or isinstance(lost, ray.exceptions.NodeDiedError) for lost in losses)


def _line(cause: BaseException) -> str:
    """Return the kind and the first sentence of an error. The rest of Ray's errors is the state of all workers."""
    sentence = " ".join(str(cause).split()).split(". ")[0].rstrip(".")
    return f"{type(cause).__name__}: {sentence[:160]}"
