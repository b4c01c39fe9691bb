"""The connection to Ray, always by the recipe's address, never to some other cluster that runs on this machine."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import ray
import ray.exceptions

from dpo_ray import errors
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import DpoRayError, InfrastructureError, RayLostError
from dpo_ray.observe.ray_output import divert_ray_loggers

from .cpu_work import cpu_work_on
from .memory_losses import count_kills_here
from .requests import local_cpus, local_memory_bytes
from .watch import watched_ray
from .worker_logs import saved_at_the_end

OBJECT_STORE_BYTES = 1 << 30  # local only: blocks are small, and laptops are too
DRIVER_ENVIRONMENT = {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_DEDUP_LOGS": "0"}
WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def session(recipe: Recipe, *, verbose: bool = False) -> Iterator[None]:
    """Connect to Ray at the recipe's address for the `with` block. An existing connection is used, and stays open.

    Raises:
        InfrastructureError: Ray does not answer at the address, or has another version.
    """
    if ray.is_initialized():
        with _causes(), cpu_work_on(recipe.cluster.roles.prepare):
            yield
        return
    os.environ.update(DRIVER_ENVIRONMENT)
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ side writes to the terminal otherwise
    # Ray refuses a variable that the job sets as well.
    of_workers = {k: v for k, v in WORKER_ENVIRONMENT.items() if k not in os.environ}
    os.environ.update(WORKER_ENVIRONMENT)  # a local Ray's workers inherit the driver's environment
    options: dict = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if recipe.ray.address == "local":
        os.environ.pop("RAY_ADDRESS", None)
        options |= {
            "num_cpus": local_cpus(recipe),
            "_memory": local_memory_bytes(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    else:
        options |= {"runtime_env": {"env_vars": of_workers}}
    divert_ray_loggers()  # and again below: the start makes more of them
    try:
        with nullcontext() if verbose else _silent_stderr():
            ray.init(recipe.ray.address, **options)
    except Exception as error:  # Ray raises a bare Exception where its processes take too long to start
        fix = "check the address, the cluster's Ray version (the same as here), and the token (RAY_AUTH_MODE, RAY_AUTH_TOKEN)"
        if recipe.ray.address == "local":
            fix = "run the same command again when this machine has less to do; --verbose shows what Ray logs"
        raise InfrastructureError(
            f"Ray does not answer: {next(iter(str(error).strip().splitlines()), type(error).__name__)}",
            where=f"ray.address={recipe.ray.address}",
            fix=fix,
        ) from error
    for name in ("ray.data", "ray.train"):  # what they log as an error, with a traceback, they raise as well
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL)
    divert_ray_loggers()
    count_kills_here()
    try:
        with (
            watched_ray(recipe.ray.address),
            _causes(),
            saved_at_the_end(),
            cpu_work_on(recipe.cluster.roles.prepare),
        ):
            yield
    except RayLostError:  # ray.shutdown would wait for the lost process
        raise
    except BaseException:
        ray.shutdown()
        raise
    else:
        ray.shutdown()


_OURS = re.compile(r"^dpo_ray\.errors\.(?P<kind>\w+): (?P<what>.*)(?:\n  -> (?P<fix>.*))?$", re.MULTILINE)


def _from_text(trace: str) -> DpoRayError | None:
    """Find an error of dpo_ray in a worker's traceback. Ray passes on only this text for tasks of Ray Data."""
    match = _OURS.search(trace)
    kind = getattr(errors, match["kind"], None) if match else None
    return kind(match["what"], fix=match["fix"] or "") if match and kind else None


@contextmanager
def _causes() -> Iterator[None]:
    """If a worker fails with a DpoRayError, raise this error again without the wrappers that Ray puts around it.

    Any other failure of a worker becomes an InfrastructureError.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        ours = cause if isinstance(cause, DpoRayError) else _from_text(str(error))
        if ours is not None:
            raise ours from error
        what = f"a worker failed: {type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"
        fix = "run the same command again: it continues from what was committed; --verbose shows what Ray and its workers log"
        raise InfrastructureError(what, where="ray", fix=fix) from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide what Ray's C++ code prints when it starts (a note on RAY_BACKEND_LOG_LEVEL). Its errors are still raised."""
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
