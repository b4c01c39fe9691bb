"""The training loop: it runs the steps in the order of the schedule, evaluates, and saves checkpoints, without Ray."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from dpo_ray.config.train import BestConfig, TrainConfig
from dpo_ray.errors import StoppedError, TrainError
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.models.work import ModelShape, peak_flops
from dpo_ray.schedule.files import RankStep
from dpo_ray.train.checkpoint.checkpoint import Best, Checkpoints, Progress
from dpo_ray.train.optimizers.build import set_learning_rate

from .evaluation import Heldout, evaluate
from .step import train_step
from .throughput import throughput, work_of_step


@dataclass(frozen=True)
class Extent:
    """The size of a training run and its device, which are known before the run starts."""

    total_steps: int
    groups: int  # training groups in an epoch
    device: torch.device
    sources: tuple[str, ...] = ()  # names of the data sources; accuracy is measured for each


@dataclass(frozen=True)
class Wish:
    """A request to the training loop, which carries it out after a step. All ranks get the same request."""

    checkpoint: bool = False  # write a checkpoint now, because a machine is about to be removed
    stop: bool = False  # write a checkpoint, then stop


def epochs_seen(steps: int, config: TrainConfig, groups: int) -> float:
    """Return the number of epochs (with a fraction) that training has finished after `steps` steps.

    Without `config.steps`, the result is at most `config.epochs`, because the last step may have fewer groups than the
    others.
    """
    seen = steps * config.groups_per_step / groups
    return seen if config.steps is not None else min(seen, float(config.epochs))


def no_wish() -> Wish:
    """Return a request that asks for nothing, so that training continues."""
    return Wish()


def train(
    policy: TokenLogps,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[RankStep],
    heldout: Heldout,
    plan: Extent,
    config: TrainConfig,
    checkpoints: Checkpoints,
    progress: Progress,
    report: Callable[[dict[str, float]], None],
    wish: Callable[[], Wish] = no_wish,
) -> Progress:
    """Run all steps after `progress`, and commit all checkpoints. Collective: all ranks must call this.

    Args:
        report: called with one row of metrics per step, held-out ones included, or with the step of an error (`_step`).
        wish: called after every step; returns what the driver or Ray requests.

    Raises:
        TrainError: a loss or gradient is not finite (no checkpoint contains it), or train.best.metric does not exist.
        StoppedError: a stop was requested. A checkpoint contains every finished step.
        ArtifactError: a checkpoint could not be written.
    """
    rows: list[dict[str, float]] = []
    shape, peak = ModelShape.of(policy.model), peak_flops(plan.device)
    began = time.monotonic()
    for share, waited in _timed(() if has_ended(progress, config.best) else steps):
        try:
            measured = _step(policy, optimizer, share, plan, config, report)
        except TrainError:
            checkpoints.finish()  # a collective call: all ranks raise this error
            raise
        progress = replace(progress, step=share.step + 1, num_tokens=progress.num_tokens + share.step_tokens)
        seconds, began = time.monotonic() - began, time.monotonic()
        row = {
            "step": progress.step,
            **measured,
            "num_tokens": progress.num_tokens,
            "epoch": epochs_seen(progress.step, config, plan.groups),
            "seconds_per_step": seconds,
            "tokens_per_second": share.step_tokens / seconds,
            **throughput(work_of_step(share.micro_batches, shape), policy.layout, seconds, peak),
            "data_wait_seconds": waited,
            "memory_gib": peak_memory_gib(plan.device),
        }
        last = progress.step == plan.total_steps
        if heldout and config.eval_every_steps and (progress.step % config.eval_every_steps == 0 or last):
            row |= (measures := evaluate(policy, heldout, config, plan.device))
            progress = judged(progress, measures, config.best)
            began = time.monotonic()
        rows.append(row)
        report(row)
        wished = wish()
        last = last or has_ended(progress, config.best)
        due = config.checkpoint_every_steps and progress.step % config.checkpoint_every_steps == 0
        if last or due or _is_best(progress) or wished.checkpoint or wished.stop:
            checkpoints.save(policy, optimizer, progress, rows)
            rows, began = [], time.monotonic()
        checkpoints.check()
        if wished.stop:
            checkpoints.finish()
            raise StoppedError(
                f"training was asked to stop, and stopped after step {progress.step} of {plan.total_steps}",
                where="train",
                fix="run the same command again: training resumes after that step",
            )
        if last:
            break
    checkpoints.finish()
    return progress


def _is_best(progress: Progress) -> bool:
    return progress.best is not None and progress.best.step == progress.step


def _step(
    policy: TokenLogps,
    optimizer: torch.optim.Optimizer,
    share: RankStep,
    plan: Extent,
    config: TrainConfig,
    report: Callable[[dict[str, float]], None],
) -> dict[str, float]:
    """Update the policy and return the step's metrics.

    An error lists the ids of the step's groups. It is also reported, as a row that has only `not_finite_step`.
    """
    learning_rate = set_learning_rate(optimizer, share.step, plan.total_steps, config.optimizer)
    micro_batches = [packed_rows(m, plan.device, policy.layout, plan.sources) for m in share.micro_batches]
    every = config.entropy_every_steps
    with_statistics = every is not None and share.step % every == 0
    try:
        measured = train_step(policy, micro_batches, config, optimizer, plan.sources, with_statistics=with_statistics)
    except TrainError as error:
        report({"not_finite_step": share.step + 1})
        groups = ", ".join(g.hex() for m in share.micro_batches if m.weight.any() for g in m.group_ids)
        raise TrainError(
            error.what,
            where=f"step {share.step + 1}, groups {groups[:400]}",
            fix=f"lower train.optimizer.learning_rate{_of_divergence(config)}, or inspect these groups; the last "
            "checkpoint is intact",
        ) from None
    return measured | {"learning_rate": learning_rate}


def _of_divergence(config: TrainConfig) -> str:
    """Return further advice for a loss that is not finite, if the scores of the divergence grow exponentially."""
    kind = config.shaping.divergence.type
    grows = kind in ("forward_kl", "alpha")
    return f", or set train.shaping.divergence (the scores of {kind} grow exponentially)" if grows else ""


def _timed(steps: Iterable[RankStep]) -> Iterator[tuple[RankStep, float]]:
    """Yield each step, and the number of seconds spent waiting for it."""
    iterator = iter(steps)
    while True:
        began = time.monotonic()
        try:
            share = next(iterator)
        except StopIteration:
            return
        yield share, time.monotonic() - began


def judged(progress: Progress, found: Mapping[str, float], config: BestConfig | None) -> Progress:
    """Compare the evaluation at the current step with the best so far. Return the progress with the better evaluation.

    If the two values are equal, the earlier evaluation stays the best.

    Args:
        found: the metrics of the evaluation at the current step, by name.
        config: the metric to compare; None: nothing is compared.

    Raises:
        TrainError: the evaluation has no metric with the name `config.metric`.
    """
    if config is None:
        return progress
    if config.metric not in found:
        known = ", ".join(sorted(found))
        what = f"the evaluation has no metric {config.metric!r}"
        raise TrainError(what, where="train.best.metric", fix=f"use one of {known}")
    value, best = found[config.metric], progress.best
    if best is None or (math.isnan(best.value) and not math.isnan(value)):
        is_better = True
    else:
        is_better = value > best.value if config.mode == "max" else value < best.value  # never true for a NaN
    if is_better or best is None:
        return replace(progress, best=Best(progress.step, value))
    return replace(progress, best=replace(best, since=best.since + 1))


def has_ended(progress: Progress, config: BestConfig | None) -> bool:
    """Return whether early stopping ends training: none of the last `patience` evaluations was a new best."""
    return config is not None and config.patience is not None and (progress.best or Best(0, 0)).since >= config.patience


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of allocated tensors on a GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # in bytes on macOS, in KiB on Linux
