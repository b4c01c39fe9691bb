"""What CUDA's kernels read of the segments, worked out by hand and run on the CPU against attention by segments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from dpo_ray.models.attention import SegmentIndex, flex, shared_prefix_attention
from dpo_ray.models.load import load_policy
from dpo_ray.models.packed_rows import Segment, packed_rows
from dpo_ray.schedule.micro_batch import pack
from tests.helpers.families import make_group

# tokens:  0 1 2 | 3 4 | 5 || 6 | 7 8
SHARED = (Segment(0, 3, 0, 0), Segment(3, 5, 0, 3), Segment(5, 6, 0, 3), Segment(6, 7, 6, 6), Segment(7, 9, 6, 7))
PACKED = (Segment(0, 5, 0, 0), Segment(5, 6, 5, 5), Segment(6, 9, 6, 6))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[1]))


def test_varlen_of_shared_prompts() -> None:
    index = SegmentIndex(SHARED, "cpu").varlen
    assert index.keys is not None
    assert index.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 6, 7, 8]
    assert index.cu_queries.tolist() == [0, 3, 5, 6, 7, 9]
    assert index.cu_keys.tolist() == [0, 3, 8, 12, 13, 16]
    assert (index.longest_queries, index.longest_keys) == (3, 5)
    assert index.cu_queries.dtype == index.cu_keys.dtype == torch.int32  # as the kernel wants them


def test_varlen_of_whole_sequences_copies_no_keys() -> None:
    index = SegmentIndex(PACKED, "cpu").varlen
    assert index.keys is None
    assert index.cu_queries.tolist() == index.cu_keys.tolist() == [0, 5, 6, 9]


def test_varlen_attention_as_the_kernel_defines_it_is_that_of_the_segments() -> None:
    """FlashAttention from 2.1 on: each sequence's last query sees its last key (bottom-right aligned)."""
    q, k, v = drawn(1, 4, 9, 8), drawn(1, 2, 9, 8), drawn(1, 2, 9, 8)
    index = SegmentIndex(SHARED, "cpu").varlen
    expected, _ = shared_prefix_attention(torch.nn.Identity(), q, k, v, None, SegmentIndex(SHARED, "cpu"))
    assert index.keys is not None
    parts = []
    for i in range(len(SHARED)):
        queries = q[:, :, index.cu_queries[i] : index.cu_queries[i + 1]]
        keys = index.keys[index.cu_keys[i] : index.cu_keys[i + 1]]
        n, m = queries.shape[2], len(keys)
        mask = torch.ones(n, m).tril(m - n).bool()
        parts.append(F.scaled_dot_product_attention(queries, k[:, :, keys], v[:, :, keys], mask, enable_gqa=True))
    torch.testing.assert_close(torch.cat(parts, dim=2).transpose(1, 2), expected)


@pytest.mark.parametrize(("window", "reach"), [(None, 9), (1, 1), (2, 2), (4, 4)])
def test_the_mask_of_flex_attention_is_the_one_drawn_by_hand(window: int | None, reach: int) -> None:
    """By the order of each sequence: a token sees itself and what precedes it, `reach` tokens in all."""
    sequences = [[0, 1, 2, 3, 4], [0, 1, 2, 5], [6, 7, 8]]
    expected = torch.zeros(9, 9, dtype=torch.bool)
    for tokens in sequences:
        for i, token in enumerate(tokens):
            expected[token, tokens[max(0, i + 1 - reach) : i + 1]] = True
    index = SegmentIndex(SHARED, "cpu")
    mask = index.block_mask(window)
    q, k = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask.mask_mod(zero, zero, q, k), expected)
    assert index.block_mask(window) is mask  # the next layer's is the same


@pytest.mark.long
def test_flex_attention_is_that_of_the_segments() -> None:
    q, k, v = drawn(1, 4, 9, 8), drawn(1, 2, 9, 8), drawn(1, 2, 9, 8)
    index = SegmentIndex(SHARED, "cpu")
    expected, _ = shared_prefix_attention(
        torch.nn.Identity(), q, k, v, None, index, scaling=0.5, sliding_window=2, softcap=2.0
    )
    torch.testing.assert_close(flex(q, k, v, index, 0.5, 2, 2.0), expected)


@pytest.mark.long
def test_other_segments_do_not_compile_a_block_again(tmp_path: Path, family: Callable[[str], Path]) -> None:
    policy, plain = (load_policy(family("llama"), torch.float32, 1024).eval() for _ in range(2))
    counter = torch._dynamo.testing.CompileCounter()
    for block in policy.model.get_decoder().layers:
        block.compile(backend=counter)
    made = []
    with torch.no_grad():
        for seed in range(5):
            rows = packed_rows(pack([make_group(seed, 3 + seed, [2 + seed, 5]), make_group(seed, 4, [1, 1 + seed])]))
            torch.testing.assert_close(policy(rows).logps, plain(rows).logps)
            made.append(counter.frame_count)
    assert made[0] > 0
    assert made[2:] == [made[2]] * 3  # once more for lengths that vary, and then never
