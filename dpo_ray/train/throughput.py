"""Hardware utilisation of a step: operations per second, and the share of tokens that was saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ray.models.packed_rows import Layout
from dpo_ray.models.work import ModelShape, Work
from dpo_ray.schedule.micro_batch import MicroBatch

from .step import over_ranks


def work_of_step(micro_batches: Sequence[MicroBatch], shape: ModelShape) -> Tensor:
    """Sum the work of a step over all ranks. Collective: all ranks must call this.

    Returns:
        float64 [4]: the number of tokens with shared prompts, with packed rows, and with padded rows; and the number of
        floating-point operations.
    """
    works = [Work.of(batch, shape) for batch in micro_batches]
    own = [[w.shared_tokens, w.packed_tokens, w.padded_tokens, w.flops] for w in works]
    return over_ranks(torch.tensor(own, dtype=torch.float64).sum(dim=0))


def throughput(work: Tensor, layout: Layout, seconds: float, peak_flops: float | None) -> dict[str, float]:
    """Convert a step's work (the result of `work_of_step`) into metrics.

    `tflops` counts 10^12 useful operations per second and worker; `mfu` is that rate divided by the device's peak.
    `sharing_saved` is the share of tokens that is saved because a prompt is computed once for all its completions.
    `padding_saved` is the share of tokens of a padded batch that would be padding.

    Args:
        seconds: duration of the step.
        peak_flops: the device's peak in operations per second; None if it is not known.
    """
    shared, packed, padded, flops = work.tolist()
    per_second = flops / seconds / (dist.get_world_size() if dist.is_initialized() else 1)
    figures = {
        "tflops": per_second / 1e12,
        "sharing_saved": 1 - shared / packed if layout == "shared" else 0.0,
        "padding_saved": 1 - packed / padded if layout != "padded" else 0.0,
    }
    return figures if peak_flops is None else figures | {"mfu": per_second / peak_flops}
