"""Train cases of the golden curves, in two processes together and in each of them alone: `python golden_process.py RANK SCRATCH`.

All trainings share one start of two processes, as to import torch takes longer than most of them.
"""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ray.data.groups import Group
from dpo_ray.schedule.build import Packing, pack_step

WORLD = 2
GROUPS_PER_STEP = 4
# `ld` needs tokens. f-divergences other than DPO's take the log-ratio itself, not beta times it: where policy and reference
# are one, they would feel the rounding of a sum that was taken elsewhere.
OWN_REFERENCE = ("ld", "js", "forward_kl")
ULPS = 16  # by which every weight is moved: sensitivity.py explains why not by 1
ERROR = 1e-4  # relative size of a planted error
TIMEOUT_SECONDS = 500

# What can be planted where the trainer calls its loss: in the loss and so in its gradient, or in the gradient alone.
ERRORS: dict[str, Callable[[Any], Any]] = {
    "loss": lambda loss: loss * (1 + ERROR),
    "gradient": lambda loss: loss + ERROR * (loss - loss.detach()),
}


@dataclass(frozen=True)
class Run:
    """One training: a case of the curves with its settings, and what is done to it on purpose."""

    case: str
    settings: dict[str, Any]  # of TrainConfig
    steps: int | None = None  # None: all
    draw: int | None = None  # seed by which every weight is moved by ULPS before step 1; None: weights stay as they are
    error: str | None = None  # planted in the loss: a name of ERRORS


Metrics = list[dict[str, float]]  # of each step


def train_all(
    directory: Path, together: Sequence[Run], alone: Sequence[Run], scratch: Path
) -> tuple[list[Metrics], list[Metrics]]:
    """Train every run from the directory's model on its rows and return the metrics of each one's steps.

    The reference is that of the rows, which are sums; of OWN_REFERENCE the model's own forward pass, token by token, after
    it was checked to have these sums.

    Args:
        together: are trained by all processes, a share of the rows each.
        alone: are trained by one process each, as many at a time as there are processes.
    """
    task = {"directory": str(directory), "together": [*map(asdict, together)], "alone": [*map(asdict, alone)]}
    (scratch / "task.json").write_text(json.dumps(task))
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(scratch)]) for rank in range(WORLD)]
    try:
        assert [p.wait(TIMEOUT_SECONDS) for p in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
    measured = [json.loads((scratch / f"measured-{rank}.json").read_text()) for rank in range(WORLD)]
    return measured[0]["together"], [measured[i % WORLD]["alone"][i // WORLD] for i in range(len(alone))]


def golden_group(number: int, row: dict[str, Any]) -> Group:
    """Make a group of a row. It has sums of log-probs only: the first token carries the sum, so that none is rounded."""

    def first(total: float, length: int) -> np.ndarray:
        values = np.zeros(length, np.float32)
        values[0] = total
        return values

    chosen, rejected = np.array(row["chosen_ids"], np.int32), np.array(row["rejected_ids"], np.int32)
    return Group(
        group_id=number.to_bytes(16, "big"),
        prompt_ids=np.array(row["prompt_ids"], np.int32),
        completion_ids=(chosen, rejected),
        scores=np.array([1, 0], np.float32),
        chosen=np.array([0]),
        rejected=np.array([1]),
        reference_token_logps=(first(row["ref_chosen"], len(chosen)), first(row["ref_rejected"], len(rejected))),
    )


def main(rank: int, scratch: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    task = json.loads((scratch / "task.json").read_text())
    directory = Path(task["directory"])
    measured: dict[str, list[Metrics]] = {}
    for name, ranks, runs in (("together", WORLD, task["together"]), ("alone", 1, task["alone"][rank::WORLD])):
        own = rank if ranks > 1 else 0
        store = dist.FileStore(str(scratch / (f"store-{name}" if ranks > 1 else f"store-{name}-{rank}")), ranks)
        dist.init_process_group("gloo", store=store, rank=own, world_size=ranks)
        steps = micro_batches(directory, own, ranks)
        measured[name] = [train(Run(**run), directory / "tiny-llama", steps, ranks) for run in runs]
        dist.destroy_process_group()
    (scratch / f"measured-{rank}.json").write_text(json.dumps(measured))


def micro_batches(directory: Path, rank: int, ranks: int) -> list[Any]:
    """Pack the directory's rows in their order, and return this rank's micro-batches of each step."""
    groups = [golden_group(i, row) for i, row in enumerate(json.loads((directory / "rows.json").read_text()))]
    packing = Packing(ranks, tokens_per_micro_batch=1200)
    starts = range(0, len(groups), GROUPS_PER_STEP)
    return [pack_step(groups[start : start + GROUPS_PER_STEP], packing)[2][rank] for start in starts]


def train(run: Run, model: Path, steps: list[Any], ranks: int) -> Metrics:
    """Train by the trainer's own step and return the metrics of the steps, until one overflows; collective."""
    import torch

    from dpo_ray.config.train import OptimizerConfig, TrainConfig
    from dpo_ray.errors import TrainError
    from dpo_ray.models.packed_rows import packed_rows
    from dpo_ray.models.sharding import shard
    from dpo_ray.train.optimizers.build import build_optimizer, set_learning_rate
    from dpo_ray.train.step import train_step

    optimizer_config = OptimizerConfig(learning_rate=1e-3, decay="constant", warmup_fraction=0, max_grad_norm=1.0)
    config = TrainConfig(optimizer=optimizer_config, workers=ranks, **run.settings)
    policy = copy.deepcopy(loaded(model, config.logprob_chunk_tokens, config.layout))
    if run.draw is not None:
        move_weights(policy, run.draw)
    shard(policy, "cpu", ranks, torch.float32).train()
    optimizer = build_optimizer(policy, optimizer_config)
    batches = [[packed_rows(batch, "cpu", policy.layout) for batch in step] for step in steps[: run.steps]]
    if run.case in OWN_REFERENCE:
        batches = [[with_own_reference(policy, rows) for rows in step] for step in batches]
    metrics = []
    with planted(run.error):
        for number, step in enumerate(batches):
            set_learning_rate(optimizer, number, len(steps), optimizer_config)
            try:
                metrics.append(train_step(policy, step, config, optimizer))
            except TrainError:  # it overflowed, which all ranks see alike; whether it may is the test's to judge
                break
    return metrics


@functools.cache
def loaded(model: Path, chunk_tokens: int, layout: str) -> Any:
    """Load the model once for all trainings of this process: to find its exact layout takes as long as some steps."""
    import torch

    from dpo_ray.models.load import load_policy

    return load_policy(model, torch.float32, chunk_tokens, layout=layout)


def move_weights(policy: Any, seed: int) -> None:
    """Move every weight by ULPS units in its last place, up or down at random; the same weights for the same seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            goes_up = torch.rand(weight.shape, generator=generator) < 0.5
            end = torch.where(goes_up, torch.inf, -torch.inf)
            for _ in range(ULPS):
                weight.copy_(torch.nextafter(weight, end))


def with_own_reference(policy: Any, rows: Any) -> Any:
    """Replace the stored sums by the log-probs that the policy gives to each token before step 1; collective."""
    import torch

    from dpo_ray.models.token_logps import sum_by_completion

    with torch.no_grad():
        own = policy(rows).logps
    real = rows.completion_weight > 0
    sums, stored = (sum_by_completion(logps, rows)[real] for logps in (own, rows.reference_token_logps))
    torch.testing.assert_close(sums, stored, rtol=1e-5, atol=1e-3)
    return replace(rows, reference_token_logps=own)


@contextmanager
def planted(error: str | None) -> Iterator[None]:
    """Put an error of ERRORS between the trainer's step and its loss."""
    from dpo_ray.train import step

    right = step.step_loss
    if error is not None:
        step.step_loss = lambda *arguments: ERRORS[error](right(*arguments))
    try:
        yield
    finally:
        step.step_loss = right


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
