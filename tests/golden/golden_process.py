"""Train the cases of the golden curves in one process or in several: `python golden_process.py RANK WORLD DIRECTORY`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ray.schedule.build import Packing, pack_step
from dpo_ray.schedule.micro_batch import Group

GROUPS_PER_STEP = 4
# `ld` needs tokens. f-divergences other than DPO's take the log-ratio itself, not beta times it: where policy and reference
# are one, they would feel the rounding of a sum that was taken elsewhere.
OWN_REFERENCE = ("ld", "js", "forward_kl")
TIMEOUT_SECONDS = 280


def run(directory: Path, settings: dict[str, dict[str, Any]], world: int, scratch: Path) -> dict[str, Any]:
    """Train every case from the directory's model on its rows, and return the metrics of each one's steps.

    The reference is that of the rows, which are sums; of OWN_REFERENCE the model's own forward pass, token by token, after
    it was seen to have these sums.
    """
    (scratch / "task.json").write_text(json.dumps({"directory": str(directory), "settings": settings}))
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(world), str(scratch)]) for rank in range(world)]
    try:
        assert [p.wait(TIMEOUT_SECONDS) for p in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
    return json.loads((scratch / "measured.json").read_text())


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


def main(rank: int, world: int, scratch: Path) -> None:
    import torch
    import torch.distributed as dist

    from dpo_ray.config.train import OptimizerConfig, TrainConfig
    from dpo_ray.models.load import load_policy
    from dpo_ray.models.packed_rows import packed_rows
    from dpo_ray.models.sharding import shard
    from dpo_ray.models.token_logps import sum_by_completion
    from dpo_ray.train.optimizer import build_optimizer, set_learning_rate
    from dpo_ray.train.step import train_step

    torch.set_num_threads(1)
    task = json.loads((scratch / "task.json").read_text())
    directory = Path(task["directory"])
    groups = [golden_group(i, row) for i, row in enumerate(json.loads((directory / "rows.json").read_text()))]
    packing = Packing(world, tokens_per_micro_batch=1200)
    steps = [pack_step(groups[s : s + GROUPS_PER_STEP], packing) for s in range(0, len(groups), GROUPS_PER_STEP)]
    store = dist.FileStore(str(scratch / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    optimizer_config = OptimizerConfig(learning_rate=1e-3, decay="constant", warmup_fraction=0, max_grad_norm=1.0)
    measured: dict[str, list[dict[str, float]]] = {}
    for case, facts in task["settings"].items():
        config = TrainConfig(optimizer=optimizer_config, workers=world, **facts)
        policy = load_policy(directory / "tiny-llama", torch.float32, config.logprob_chunk_tokens, layout=config.layout)
        shard(policy, "cpu", world, torch.float32).train()
        optimizer = build_optimizer(policy, optimizer_config)
        measured[case] = []
        known: list[list[torch.Tensor]] = []
        for _, _, ranks in steps:
            batches = [packed_rows(m, "cpu", policy.layout) for m in ranks[rank]]
            with torch.no_grad():
                known.append([policy(rows).logps for rows in batches])
            for rows, own in zip(batches, known[-1], strict=True):
                real = rows.completion_weight > 0
                stored = sum_by_completion(rows.reference_token_logps, rows)[real]
                torch.testing.assert_close(sum_by_completion(own, rows)[real], stored, rtol=1e-5, atol=1e-3)
        for number, (_, _, ranks) in enumerate(steps):
            set_learning_rate(optimizer, number, len(steps), optimizer_config)
            batches = [packed_rows(m, "cpu", policy.layout) for m in ranks[rank]]
            if case in OWN_REFERENCE:
                batches = [replace(b, reference_token_logps=k) for b, k in zip(batches, known[number], strict=True)]
            measured[case].append(train_step(policy, batches, config, optimizer))
    if rank == 0:
        (scratch / "measured.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
