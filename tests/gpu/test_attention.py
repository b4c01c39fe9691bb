"""On a CUDA device: the fused kernels give what the CPU's segment-by-segment attention gives."""

from __future__ import annotations

import pytest
import torch

from dpo_ray.models.attention import SegmentIndex, shared_prefix_attention
from dpo_ray.models.packed_rows import Segment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHARED = (Segment(0, 40, 0, 0), Segment(40, 57, 0, 40), Segment(57, 58, 0, 40), Segment(58, 90, 58, 58))
PACKED = (Segment(0, 57, 0, 0), Segment(57, 58, 57, 57), Segment(58, 90, 58, 58))


@pytest.mark.parametrize("segments", [SHARED, PACKED], ids=["shared", "packed"])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["varlen", "flex"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_and_gradients_agree_with_the_cpu(
    segments: tuple[Segment, ...], window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    """Against float32 on the CPU: within the rounding of bfloat16 inputs and of one accumulation."""
    generator = torch.Generator().manual_seed(0)
    shape = {"query": (1, 8, 90, 64), "key": (1, 2, 90, 64), "value": (1, 2, 90, 64)}
    values = {name: torch.randn(s, generator=generator).bfloat16().float() for name, s in shape.items()}
    weight = torch.randn(1, 90, 8, 64, generator=generator)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = {n: v.to(device=device, dtype=dtype).requires_grad_() for n, v in values.items()}
        out, _ = shared_prefix_attention(
            torch.nn.Identity(),
            **inputs,
            attention_mask=None,
            segments=SegmentIndex(segments, device),
            sliding_window=window,
            softcap=softcap,
        )
        (out.float() * weight.to(device)).sum().backward()
        return [out.float().cpu(), *(x.grad.float().cpu() for x in inputs.values() if x.grad is not None)]

    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    for gpu, cpu in zip(run("cuda", dtype), run("cpu", torch.float32), strict=True):
        torch.testing.assert_close(gpu, cpu, atol=tolerance, rtol=tolerance)
