"""The training loop: steps in the schedule's order, evaluation and checkpoints in between. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from dpo_ray.config.train import TrainConfig
from dpo_ray.errors import TrainError
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.schedule.records import RankStep

from .checkpoint import Checkpoints, Progress
from .evaluation import Heldout, evaluate
from .optimizer import set_learning_rate
from .step import train_step


@dataclass(frozen=True)
class Plan:
    """The extent of a run, known before it starts."""

    total_steps: int
    groups: int  # training groups in an epoch
    device: torch.device
    sources: tuple[str, ...] = ()  # of the data, whose accuracies are measured apart


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
) -> Progress:
    """Run the steps that are left, from `progress` on; collective. `report` gets a row per step, and per evaluation.

    Raises:
        TrainError: a loss or gradient is not finite; no checkpoint holds that update.
    """
    rows: list[dict[str, float]] = []
    began = time.monotonic()
    for share in steps:
        learning_rate = set_learning_rate(optimizer, share.step, plan.total_steps, config.optimizer)
        micro_batches = [packed_rows(m, plan.device, policy.layout, plan.sources) for m in share.micro_batches]
        try:
            measured = train_step(
                policy,
                micro_batches,
                config,
                optimizer,
                plan.sources,
                with_statistics=config.entropy_every_steps is not None and share.step % config.entropy_every_steps == 0,
            )
        except TrainError as error:
            groups = ", ".join(g.hex() for m in share.micro_batches if m.weight.any() for g in m.group_ids)
            raise TrainError(
                error.what,
                where=f"step {share.step + 1}, groups {groups[:400]}",
                fix="lower train.optimizer.learning_rate, or look at these groups; the last checkpoint is sound",
            ) from None
        progress = replace(progress, step=share.step + 1, num_tokens=progress.num_tokens + share.step_tokens)
        seconds, began = time.monotonic() - began, time.monotonic()
        row = {
            "step": progress.step,
            **measured,
            "learning_rate": learning_rate,
            "num_tokens": progress.num_tokens,
            "epoch": progress.step * config.groups_per_step / plan.groups,
            "seconds_per_step": seconds,
            "tokens_per_second": share.step_tokens / seconds,
        }
        last = progress.step == plan.total_steps
        if heldout and config.eval_every_steps and (progress.step % config.eval_every_steps == 0 or last):
            row |= evaluate(policy, heldout, config, plan.device)
            began = time.monotonic()
        rows.append(row)
        report(row)
        if last or (config.checkpoint_every_steps and progress.step % config.checkpoint_every_steps == 0):
            checkpoints.save(policy, optimizer, progress, rows)
            rows, began = [], time.monotonic()
    return progress
