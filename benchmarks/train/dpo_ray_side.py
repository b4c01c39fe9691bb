"""dpo_ray's side of the benchmark `train.py`: the training core alone, in a process of its own; prints JSON on its last line.

What is timed is what a training worker does for a step: lay the step's pairs out as micro-batches (`pack`, `packed_rows`), and
`train_step`: forward, backward, all measures (the entropy every tenth step, as by default), clipping, AdamW. The first steps
are not counted. Imports torch, transformers, numpy and pydantic alone; neither Ray nor vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.train.rows import PairRow, read_rows
from dpo_ray.config.train import OptimizerConfig, TrainConfig
from dpo_ray.data.groups import Group
from dpo_ray.models.attention import IMPLEMENTATION
from dpo_ray.models.packed_rows import Layout, packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.schedule.micro_batch import MicroBatch, pack
from dpo_ray.train.optimizers.build import build_optimizer
from dpo_ray.train.step import train_step


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    rows = read_rows(args.rows)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation=attention(args.layout), local_files_only=True
    )
    policy = TokenLogps(model, layout=args.layout).train()
    answer = timed_steps(policy, rows, args.pairs_per_step, args.warm_up_steps, args.learning_rate)
    print(json.dumps(answer | {"load": os.getloadavg()[0]}))


def attention(layout: Layout) -> str:
    """Name the attention that a layout needs."""
    return "sdpa" if layout == "padded" else IMPLEMENTATION


def timed_steps(
    policy: TokenLogps,
    rows: Sequence[PairRow],
    pairs_per_step: int,
    warm_up_steps: int,
    learning_rate: float,
    tokens_per_micro_batch: int = 1 << 30,
) -> dict[str, object]:
    """Train on the rows in their order; returns the seconds of the counted steps, and the loss of every step."""
    device = next(policy.parameters()).device
    config = TrainConfig(
        groups_per_step=pairs_per_step, optimizer=OptimizerConfig(learning_rate=learning_rate, decay="constant")
    )
    optimizer = build_optimizer(policy, config.optimizer)
    groups = [as_group(row, i) for i, row in enumerate(rows)]
    losses, seconds, cpu_seconds = [], [], []
    for step, first in enumerate(range(0, len(groups), pairs_per_step)):
        began, cpu_began = _now(device), time.process_time()
        micro_batches = [
            packed_rows(batch, device, policy.layout)
            for batch in _micro_batches(groups[first : first + pairs_per_step], tokens_per_micro_batch)
        ]
        every = config.entropy_every_steps
        measured = train_step(
            policy, micro_batches, config, optimizer, with_statistics=every is not None and step % every == 0
        )
        seconds.append(_now(device) - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        losses.append(measured["loss"])
    return {"seconds": sum(seconds[warm_up_steps:]), "cpu_seconds": sum(cpu_seconds[warm_up_steps:]), "losses": losses}


def as_group(row: PairRow, number: int) -> Group:
    """Make a group of a pair; the first completion is the preferred one."""
    return Group(
        group_id=number.to_bytes(16, "big"),
        prompt_ids=np.array(row.prompt_ids, np.int32),
        completion_ids=(np.array(row.chosen_ids, np.int32), np.array(row.rejected_ids, np.int32)),
        scores=np.array([1, 0], np.float32),
        chosen=np.array([0]),
        rejected=np.array([1]),
        reference_token_logps=(
            np.array(row.reference_chosen, np.float32),
            np.array(row.reference_rejected, np.float32),
        ),
    )


def _micro_batches(groups: Sequence[Group], tokens: int) -> list[MicroBatch]:
    """Pack groups in their order into micro-batches of at most so many tokens."""
    parts: list[list[Group]] = [[]]
    for group in groups:
        if parts[-1] and sum(g.tokens for g in parts[-1]) + group.tokens > tokens:
            parts.append([])
        parts[-1].append(group)
    return [pack(part) for part in parts]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def add_reference(rows: Sequence[PairRow], model: PreTrainedModel, pairs_at_once: int = 8) -> list[PairRow]:
    """Fill in the log-probs of the reference, which is the model as it is now."""
    policy = TokenLogps(model).eval()
    device = next(policy.parameters()).device
    filled = []
    for first in range(0, len(rows), pairs_at_once):
        some = rows[first : first + pairs_at_once]
        batch = pack([as_group(row, i) for i, row in enumerate(some)])
        logps = iter(policy(packed_rows(batch, device)).logps.float().cpu().tolist())
        for row in some:
            chosen = [next(logps) for _ in row.chosen_ids]
            filled.append(
                row._replace(reference_chosen=chosen, reference_rejected=[next(logps) for _ in row.rejected_ids])
            )
    return filled


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True, type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--layout", choices=["shared", "packed", "padded"], default="shared")
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--warm-up-steps", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
