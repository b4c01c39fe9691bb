"""A training step's memory as PyTorch's own tracker counts it, on tensors without memory: any model on any machine.

The project's own code runs: model, layout, checkpointing, sharding, head, loss, step. Three things stand for what a CPU without
other ranks does not have: a process group that sends nothing, CUDA's attention kernel (by the shapes of its results), and ones
for the numbers that a step reads from tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from dpo_ray.config.train import TrainConfig
from dpo_ray.data.groups import Group
from dpo_ray.models.attention import IMPLEMENTATION, shared_prefix_attention, varlen
from dpo_ray.models.load import as_policy
from dpo_ray.models.lora import add_lora
from dpo_ray.models.packed_rows import PackedRows, packed_rows
from dpo_ray.models.sharding import prepare_blocks, shard
from dpo_ray.models.sliced_weights import _make_buffers
from dpo_ray.schedule.micro_batch import MicroBatch, pack
from dpo_ray.train.optimizers.build import build_optimizer
from dpo_ray.train.step import train_step

CATEGORIES = {  # of the planner: those of the tracker
    "weights": ("Sharded Param",),
    "optimizer": ("OptState",),
    "gathered": ("Unsharded Param", "All Gather"),
    "kept": ("Activation", "Buffer", "Inputs"),
    "gradients and work": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter", "Temp"),
}


def micro_batch(groups: int, prompt: int, completion: int) -> MicroBatch:
    """Make a micro-batch of equal pairs."""
    ids, pair = np.ones(prompt + completion, np.int32), np.array([1, 0], np.float32)
    one = (np.array([0], np.int32), np.array([1], np.int32))
    group = Group(bytes(16), ids[:prompt], (ids[prompt:], ids[prompt:]), pair, *one)
    return pack([group] * groups)


def measured_bytes(
    config: PreTrainedConfig, train: TrainConfig, ranks: int, micro_batches: Sequence[MicroBatch], dtype: torch.dtype
) -> dict[str, int]:
    """Run a step of one of `ranks` ranks, and return the bytes of each category at the peak, with `total`."""
    with _without_other_ranks(ranks), _with_cuda_attention():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        _make_buffers(model)
        policy = as_policy(model, train.logprob_chunk_tokens, train.layout, "a made model")
        if train.lora is not None:
            add_lora(policy.model, train.lora, seed=0)
        prepare_blocks(policy, train.activation_checkpointing, compiled=False)
        shard(policy, "cpu", ranks, dtype, train.sharding).train()
        rows = [packed_rows(batch, layout=policy.layout) for batch in micro_batches]
        with FakeTensorMode(allow_non_fake_inputs=True), _Ones():
            policy._apply(lambda t: torch.empty_like(t, device="cpu"))
            optimizer = build_optimizer(policy, train.optimizer)
            train_step(policy, rows[:1], train, optimizer)  # the optimizer's state is there after it
            # It works in place. DTensor looks at the step's results on whole parameters, which the tracker would count.
            optimizer.step = lambda closure=None: None
            tracker = FSDPMemTracker(policy, optimizer)
            with tracker:
                train_step(policy, _Turns(rows, tracker), train, optimizer)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    named = {str(getattr(kind, "value", kind)): value for kind, value in peak.items()}
    found = {name: sum(named.get(kind, 0) for kind in kinds) for name, kinds in CATEGORIES.items()}
    assert sum(found.values()) == named["Total"]
    return found | {"total": named["Total"]}


class _Turns(list[PackedRows]):
    """Micro-batches; the tracker knows one forward pass at a time, so it forgets its modules' figures before each."""

    def __init__(self, rows: Sequence[PackedRows], tracker: FSDPMemTracker) -> None:
        super().__init__(rows)
        self._tracker = tracker

    def __iter__(self) -> Iterator[PackedRows]:
        for rows in super().__iter__():
            self._tracker.reset_mod_stats()
            yield rows


class _Ones(TorchDispatchMode):
    """Answer with 1 where the program reads a number, and let every mask choose all: no tensor here has values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_other_ranks(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _with_cuda_attention() -> Iterator[None]:
    """Use the attention kernel of CUDA, of which tensors without memory need only the shapes."""

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, segments: Any, scaling: Any = None,
        sliding_window: Any = None, **_: Any,
    ) -> Any:  # fmt: skip
        return varlen(query, key, value, segments, scaling, sliding_window), None

    AttentionInterface.register(IMPLEMENTATION, attention)
    try:
        yield
    finally:
        AttentionInterface.register(IMPLEMENTATION, shared_prefix_attention)
