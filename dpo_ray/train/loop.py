"""The training loop: steps in the schedule's order, evaluation and checkpoints in between. Knows nothing of Ray."""

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
class Plan:
    """The extent of a run, known before it starts."""

    total_steps: int
    groups: int  # training groups in an epoch
    device: torch.device
    sources: tuple[str, ...] = ()  # of the data, whose accuracies are measured apart


@dataclass(frozen=True)
class Wish:
    """What is asked of training between two steps, of all ranks alike."""

    checkpoint: bool = False  # now: a machine is about to go away
    stop: bool = False  # after a checkpoint


def no_wish() -> Wish:
    """Train on."""
    return Wish()


def train(
    policy: TokenLogps,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[RankStep],
    heldout: Heldout,
    plan: Plan,
    config: TrainConfig,
    checkpoints: Checkpoints,
    progress: Progress,
    report: Callable[[dict[str, float]], None],
    wish: Callable[[], Wish] = no_wish,
) -> Progress:
    """Run the steps that are left, from `progress` on; collective. Ends with all checkpoints committed.

    Args:
        report: gets a row per step; one in which the held-out data was measured has these figures too.
        wish: is asked after every step.

    Raises:
        TrainError: a loss or gradient is not finite; no checkpoint holds that update. Or train.best.metric is not measured.
        StoppedError: that was wished for; a checkpoint holds every step that was done.
        ArtifactError: a checkpoint could not be written.
    """
    rows: list[dict[str, float]] = []
    shape, peak = ModelShape.of(policy.model), peak_flops(plan.device)
    began = time.monotonic()
    for share, waited in _timed(() if has_ended(progress, config.best) else steps):
        try:
            measured = _step(policy, optimizer, share, plan, config)
        except TrainError:
            checkpoints.finish()  # all ranks see this error
            raise
        progress = replace(progress, step=share.step + 1, num_tokens=progress.num_tokens + share.step_tokens)
        seconds, began = time.monotonic() - began, time.monotonic()
        row = {
            "step": progress.step,
            **measured,
            "num_tokens": progress.num_tokens,
            "epoch": progress.step * config.groups_per_step / plan.groups,
            "seconds_per_step": seconds,
            "tokens_per_second": share.step_tokens / seconds,
            **throughput(work_of_step(share.micro_batches, shape), policy.layout, seconds, peak),
            "data_wait_seconds": waited,
            "memory_gib": peak_memory_gib(plan.device),
        }
        last = progress.step == plan.total_steps
        if heldout and config.eval_every_steps and (progress.step % config.eval_every_steps == 0 or last):
            row |= (found := evaluate(policy, heldout, config, plan.device))
            progress = judged(progress, found, config.best)
            began = time.monotonic()
        rows.append(row)
        report(row)
        wished = wish()
        last = last or has_ended(progress, config.best)
        is_best = progress.best is not None and progress.best.step == progress.step
        due = config.checkpoint_every_steps and progress.step % config.checkpoint_every_steps == 0
        if last or due or is_best or wished.checkpoint or wished.stop:
            checkpoints.save(policy, optimizer, progress, rows)
            rows, began = [], time.monotonic()
        checkpoints.check()
        if wished.stop:
            checkpoints.finish()
            raise StoppedError(
                f"training was asked to stop, and has, after step {progress.step} of {plan.total_steps}",
                where="train",
                fix="the same command goes on from there",
            )
        if last:
            break
    checkpoints.finish()
    return progress


def _step(
    policy: TokenLogps, optimizer: torch.optim.Optimizer, share: RankStep, plan: Plan, config: TrainConfig
) -> dict[str, float]:
    """Update the policy, and return what was measured; an error names the groups that it was about."""
    learning_rate = set_learning_rate(optimizer, share.step, plan.total_steps, config.optimizer)
    micro_batches = [packed_rows(m, plan.device, policy.layout, plan.sources) for m in share.micro_batches]
    every = config.entropy_every_steps
    with_statistics = every is not None and share.step % every == 0
    try:
        measured = train_step(policy, micro_batches, config, optimizer, plan.sources, with_statistics=with_statistics)
    except TrainError as error:
        groups = ", ".join(g.hex() for m in share.micro_batches if m.weight.any() for g in m.group_ids)
        raise TrainError(
            error.what,
            where=f"step {share.step + 1}, groups {groups[:400]}",
            fix="lower train.optimizer.learning_rate, or look at these groups; the last checkpoint is sound",
        ) from None
    return measured | {"learning_rate": learning_rate}


def _timed(steps: Iterable[RankStep]) -> Iterator[tuple[RankStep, float]]:
    """Yield each step with the seconds that it was waited for."""
    iterator = iter(steps)
    while True:
        began = time.monotonic()
        try:
            share = next(iterator)
        except StopIteration:
            return
        yield share, time.monotonic() - began


def judged(progress: Progress, found: Mapping[str, float], config: BestConfig | None) -> Progress:
    """Compare an evaluation, of the step that `progress` is at, with the best so far; of equals the first is best.

    Raises:
        TrainError: it has no figure of the name that is compared.
    """
    if config is None:
        return progress
    if config.metric not in found:
        known = ", ".join(sorted(found))
        what = f"the evaluation has no figure {config.metric!r}"
        raise TrainError(what, where="train.best.metric", fix=f"name one of {known}")
    value, best = found[config.metric], progress.best
    if best is None or (math.isnan(best.value) and not math.isnan(value)):
        is_better = True
    else:
        is_better = value > best.value if config.mode == "max" else value < best.value  # a NaN never is
    if is_better or best is None:
        return replace(progress, best=Best(progress.step, value))
    return replace(progress, best=replace(best, since=best.since + 1))


def has_ended(progress: Progress, config: BestConfig | None) -> bool:
    """Say whether training ends before its last step, as no evaluation gets better any more."""
    return config is not None and config.patience is not None and (progress.best or Best(0, 0)).since >= config.patience


def peak_memory_gib(device: torch.device) -> float:
    """Measure the most memory so far in GiB: of a GPU what its tensors took, else what this process had in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux
