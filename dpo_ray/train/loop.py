"""The training loop: steps in the schedule's order, evaluation and checkpoints in between. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_ray.config.data import EVAL
from dpo_ray.config.train import TrainConfig
from dpo_ray.errors import TrainError
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.schedule.records import RankStep

from .checkpoint import Checkpoints, Progress
from .optimizer import set_learning_rate
from .step import MEASURES, accurate, evaluate_pairs, train_step

# Columns of the held-out table: one row per pair.
HELDOUT = (
    "loss",
    "reward_chosen",
    "reward_rejected",
    "accurate",
    "logp_chosen",
    "logp_rejected",
    "reference_chosen",
    "reference_rejected",
    "tokens_chosen",
    "tokens_rejected",
    "weight",
)

# Readers of the held-out splits by name, `eval` or `eval_NAME` of each set; all ranks have them in the same order.
Heldout = Mapping[str, Callable[[], Iterable[RankStep]]]


@dataclass(frozen=True)
class Plan:
    """The extent of a run, known before it starts."""

    total_steps: int
    groups: int  # training groups in an epoch
    device: torch.device


def train(
    policy: nn.Module,
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
        micro_batches = [packed_rows(m, plan.device) for m in share.micro_batches]
        try:
            measured = train_step(
                policy, micro_batches, share.step_weight, config.objective, optimizer, config.optimizer.max_grad_norm
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


def evaluate(policy: nn.Module, heldout: Heldout, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """Average the held-out pairs' measures over all ranks, named as `evaluation` does; collective."""
    sums = torch.stack(
        [weighted_sums(heldout_table(policy, read(), config, device)) for read in heldout.values()]
    )  # [splits, HELDOUT + 1]
    if dist.is_initialized() and dist.get_world_size() > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return evaluation(dict(zip(heldout, sums.cpu(), strict=True)))


def weighted_sums(table: Tensor) -> Tensor:
    """Sum a held-out table's columns by weight, and the weight: float64 [HELDOUT + 1]."""
    weight = table[:, -1:]
    return torch.cat([(table * weight).sum(dim=0), weight.sum(dim=0)])


def evaluation(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Turn the weighted sums of each held-out split into means under TRL's names.

    Those over all held-out pairs have `eval_` before them; those of a named set `eval_NAME_`, as TRL's have.
    """
    means = _means(EVAL, torch.stack(list(sums.values())).sum(dim=0))
    for split in sorted(sums.keys() - {EVAL}):
        means |= _means(split, sums[split])
    return means


def _means(prefix: str, sums: Tensor) -> dict[str, float]:
    mean = dict(zip(HELDOUT, (sums[:-1] / sums[-1]).tolist(), strict=True))
    values = (
        mean["loss"],
        mean["reward_chosen"],
        mean["reward_rejected"],
        mean["reward_chosen"] - mean["reward_rejected"],
        mean["accurate"],
        mean["logp_chosen"],
        mean["logp_rejected"],
    )
    return {f"{prefix}_{name}": value for name, value in zip(MEASURES, values, strict=True)}


def heldout_table(policy: nn.Module, heldout: Iterable[RankStep], config: TrainConfig, device: torch.device) -> Tensor:
    """Measure this rank's held-out pairs: float64 [pairs, HELDOUT] on the CPU. Fillers are left out. Collective."""
    policy.eval()
    beta, tables = config.objective.beta, [torch.zeros(0, len(HELDOUT), dtype=torch.float64)]
    for share in heldout:
        for micro_batch in share.micro_batches:
            rows = packed_rows(micro_batch, device)
            pairs, losses = evaluate_pairs(policy, rows, config.objective)
            columns = (
                losses,
                beta * pairs.chosen_logratio,
                beta * pairs.rejected_logratio,
                accurate(pairs),
                pairs.policy_chosen,
                pairs.policy_rejected,
                pairs.reference_chosen,
                pairs.reference_rejected,
                pairs.chosen_tokens,
                pairs.rejected_tokens,
                rows.pair_weight,
            )
            table = torch.stack([c.double() for c in columns], dim=1).cpu()
            tables.append(table[table[:, -1] > 0])
    policy.train()
    return torch.cat(tables)
