"""The code that each training process (worker) runs under Ray Train."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from dpo_ray.artifacts.tables import parquet_bytes
from dpo_ray.errors import AuditError, StoppedError, TrainError, WorkersLostError
from dpo_ray.models.adapter import adapter_directory
from dpo_ray.models.build import build_policy
from dpo_ray.models.load import model_directory
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.schedule.audit_pairs import ComparedGroup, compared_groups
from dpo_ray.schedule.files import heldout_splits, prefetched, read_share
from dpo_ray.train.checkpoint.checkpoint import Checkpoints, Progress
from dpo_ray.train.optimizers.build import build_optimizer
from dpo_ray.train.optimizers.moments import gather_moments, scatter_moments

from .evaluation import HELDOUT, heldout_figures, heldout_sums
from .export import gather_policy, write_policy
from .loop import Extent, Wish, train
from .rng import seed_rank
from .step import over_ranks
from .task import AuditTask, TrainTask

logger = logging.getLogger(__name__)
MOMENTS = "moments.safetensors"

# Errors that all ranks raise together, because they depend on gathered values only. So no rank waits for another.
COLLECTIVE = (AuditError, StoppedError, TrainError)


def train_and_export(task: TrainTask) -> dict[str, Any]:
    """Train the policy and export it.

    Returns:
        On rank 0, a mapping with the manifest entries of the artifact's files and the results of training. On other
        ranks {}. If all ranks raised the same error, the mapping has only the key `error`. If the audit forbids
        training, it has only the key `audit`.

    Raises:
        WorkersLostError: another rank did not respond in time. Ray Train then stops and restarts all workers.
    """
    try:
        return _run(task)
    except COLLECTIVE as error:
        return {"error": error}
    except RuntimeError as error:  # raised by gloo; with NCCL the watchdog ends the process
        if "timed out" not in str(error).lower():
            raise
        raise WorkersLostError(
            f"rank {dist.get_rank()} waited {task.config.hang_seconds:g} s for another rank: {error}",
            where="train",
            fix="find out what blocks a worker; train.hang_seconds limits how long a rank waits",
        ) from error


def _run(task: TrainTask) -> dict[str, Any]:
    rank = dist.get_rank()
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(task.cpus)))
    source = model_directory(task.model)
    config = task.config
    policy = build_policy(
        source,
        adapter_directory(task.model),
        config,
        getattr(torch, task.dtype),
        device,
        task.seed,
        Path(task.trained_adapter) if task.trained_adapter else None,
    ).train()
    optimizer = build_optimizer(policy, task.config.optimizer)
    seed_rank(task.seed, rank)
    checkpoints = Checkpoints(
        task.checkpoints, task.staging.attempt, config.keep_checkpoints, task.identity, task.seed, config.hang_seconds
    )
    progress = checkpoints.load_newest(policy, optimizer)
    if task.moments is not None and not progress.step:
        scatter_moments(policy, optimizer, load(task.moments.read_bytes(MOMENTS)) if rank == 0 else {})
    counts = task.schedule.rows
    sources = task.sources if len(task.sources) > 1 else ()  # the accuracy of a single source is that of all data
    plan = Extent(counts["train/steps"], counts["train/groups"], device, sources)

    def report(row: dict[str, Any]) -> None:
        if rank == 0:
            task.inbox.put.remote(row)

    if progress.step:
        logger.info("resuming from the checkpoint of step %d", progress.step)
    elif task.audit is not None:
        progress = replace(progress, figures=_audited(policy, task.audit, task, rank, device))
    if task.audit is not None and progress.figures is not None and not task.audit.goes_on(progress.figures):
        return {"audit": progress.figures}
    known = checkpoints.metrics(progress.step) if rank == 0 else []
    report({"restored_step": progress.step, "known": known, "audit": progress.figures})
    share = partial(read_share, task.schedule, rank=rank, ranks=dist.get_world_size(), packed_ranks=config.workers)
    steps = prefetched(share(split="train", start_step=progress.step))
    heldout = {name: partial(share, split=name) for name in heldout_splits(task.schedule)}
    progress = train(
        policy,
        optimizer,
        steps,
        heldout,
        plan,
        task.config,
        checkpoints,
        progress,
        report,
        _Wishes(task.inbox, rank),
    )
    if progress.best is not None and progress.best.step != progress.step:
        checkpoints.load(policy, optimizer, progress.best.step)
    measured = {name: heldout_sums(policy, read(), task.config, device) for name, read in heldout.items()}
    tables = {name: _gathered(rows) for name, (_, rows) in measured.items()}
    final = heldout_figures({name: sums for name, (sums, _) in measured.items()})
    weights = gather_policy(policy, getattr(torch, task.dtype), config.lora)
    moments = gather_moments(policy, optimizer) if task.keep_moments else {}
    if rank:
        return {}
    checkpoints.check_claim()
    result = _written(policy, weights, source, tables, checkpoints, progress, task)
    if task.keep_moments:
        result["entries"].append(task.staging.write(MOMENTS, save(moments)))
    return result | {"final_evaluation": final}


class _Wishes:
    """Requests of the driver or Ray to stop or to write a checkpoint. All ranks carry them out after the same step."""

    def __init__(self, inbox: Any, rank: int) -> None:
        self._stopped = inbox.stopped.remote() if rank == 0 else None
        self._preemption: Any = None  # the last preemption notice that was handled

    def __call__(self) -> Wish:
        """Return the current request, which is the same on all ranks. This sends no messages through Ray.

        Collective: all ranks must call this.
        """
        stop = False
        if self._stopped is not None and ray.wait([self._stopped], timeout=0)[0]:
            ray.get(self._stopped)  # raises if the actor has died instead
            stop = True
        preemption = ray.train.get_preemption_info()  # a node is draining, e.g. after SIGTERM to `ray start`
        leaves, self._preemption = preemption not in (None, self._preemption), preemption
        wishes = over_ranks(torch.tensor([leaves, stop], dtype=torch.int64))
        return Wish(checkpoint=bool(wishes[0]), stop=bool(wishes[1]))


def _audited(policy: TokenLogps, audit: AuditTask, task: TrainTask, rank: int, device: torch.device) -> dict[str, Any]:
    """Audit the reference: score the first groups of the schedule (a random sample) with the untrained policy.

    Collective: all ranks must call this.

    Returns:
        Statistics of the differences between the policy's log-probs and the stored reference log-probs.
    """
    compared: list[ComparedGroup] = []
    policy.eval()
    steps = math.ceil(audit.groups / task.config.groups_per_step)
    ranks = dist.get_world_size()
    for share in islice(read_share(task.schedule, "train", rank, ranks, task.config.workers), steps):
        for micro_batch in share.micro_batches:
            with torch.no_grad():
                logps = policy(packed_rows(micro_batch, device, policy.layout)).logps.cpu().numpy()
            compared += compared_groups(micro_batch, logps)
    policy.train()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, compared)
    return audit.measure([group for part in gathered for group in part])


def _gathered(table: torch.Tensor) -> np.ndarray:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, table.numpy())
    return np.concatenate(parts)


def _written(
    policy: TokenLogps,
    weights: dict[str, torch.Tensor],
    source: Path,
    heldout: dict[str, np.ndarray],
    checkpoints: Checkpoints,
    progress: Progress,
    task: TrainTask,
) -> dict[str, Any]:
    """Write the files of the artifact `train` to its staging directory, on rank 0.

    Returns:
        A mapping with the manifest entries of these files, and with the results of training.
    """
    entries = []
    with tempfile.TemporaryDirectory(prefix="dpo-ray-policy-") as scratch:
        dtype, lora = getattr(torch, task.dtype), task.config.lora
        write_policy(policy, weights, dtype, source, task.template, Path(scratch), lora, task.model.path)
        files = [file for file in sorted(Path(scratch).rglob("*")) if file.is_file()]
        entries += [task.staging.upload(f"policy/{f.relative_to(scratch).as_posix()}", f) for f in files]
    metrics = checkpoints.metrics(progress.step)
    lines = "".join(json.dumps(row) + "\n" for row in metrics)
    entries.append(task.staging.write("metrics.jsonl", lines.encode(), rows=len(metrics)))
    if heldout:
        table = heldout_pairs(heldout)
        entries.append(task.staging.write("heldout.parquet", parquet_bytes(table), rows=len(table)))
    return {
        "entries": entries,
        "audit": progress.figures,
        "steps": progress.step,
        "num_tokens": progress.num_tokens,
        "final": (metrics[-1] if metrics else {}) | ({"best_step": progress.best.step} if progress.best else {}),
    }


def heldout_pairs(heldout: dict[str, np.ndarray]) -> pa.Table:
    """Build one table from the held-out rows of each split (`eval`, or `eval_NAME` for a named set)."""
    splits = np.repeat(list(heldout), [len(table) for table in heldout.values()])
    pairs = np.concatenate(list(heldout.values()))
    return pa.table({"split": splits, **{name: pairs[:, i] for i, name in enumerate(HELDOUT)}})
