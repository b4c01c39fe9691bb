"""On a CUDA device: the varlen kernel gives what the CPU's segment-by-segment attention gives."""

from __future__ import annotations

import pytest
import torch

from dpo_ray.models.packed_rows import Segment
from dpo_ray.models.shared_prefix import shared_prefix_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SEGMENTS = (Segment(0, 40, 0, 0), Segment(40, 57, 0, 40), Segment(57, 58, 0, 40), Segment(58, 90, 58, 58))


@pytest.mark.parametrize("window", [None, 16])
def test_forward_and_gradients_agree_with_the_cpu(window: int | None) -> None:
    """bfloat16 on CUDA against float32 on the CPU: within the rounding of the inputs and of one accumulation."""
    generator = torch.Generator().manual_seed(0)
    shape = {"query": (1, 8, 90, 64), "key": (1, 2, 90, 64), "value": (1, 2, 90, 64)}
    values = {name: torch.randn(s, generator=generator).bfloat16().float() for name, s in shape.items()}
    weight = torch.randn(1, 90, 8, 64, generator=generator)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = {n: v.to(device=device, dtype=dtype).requires_grad_() for n, v in values.items()}
        out, _ = shared_prefix_attention(
            torch.nn.Identity(), **inputs, attention_mask=None, segments=SEGMENTS, sliding_window=window
        )
        (out.float() * weight.to(device)).sum().backward()
        return [out.float().cpu(), *(x.grad.float().cpu() for x in inputs.values() if x.grad is not None)]

    for gpu, cpu in zip(run("cuda", torch.bfloat16), run("cpu", torch.float32), strict=True):
        torch.testing.assert_close(gpu, cpu, atol=3e-2, rtol=3e-2)
