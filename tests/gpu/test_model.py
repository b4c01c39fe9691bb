"""On a CUDA device: whole models, compiled blocks and the head, against the CPU and against full logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dpo_ray.models.head import head_scores
from dpo_ray.models.load import load_policy
from dpo_ray.models.packed_rows import Layout, packed_rows
from dpo_ray.schedule.micro_batch import pack
from tests.helpers.families import SERVED, make_group, write_family

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GROUPS = [make_group(1, 90, [40, 20]), make_group(2, 7, [60, 1, 30]), make_group(3, 1, [1, 2])]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_bfloat16_on_cuda_agrees_with_float32_on_the_cpu(name: str, layout: Layout, tmp_path: Path) -> None:
    directory = write_family(name, tmp_path, SERVED)
    exact = load_policy(directory, torch.float32, 64).eval()(packed_rows(pack(GROUPS))).logps
    policy = load_policy(directory, torch.bfloat16, 64, layout=layout).eval().cuda()
    actual = policy(packed_rows(pack(GROUPS), "cuda", policy.layout)).logps
    assert actual.dtype == torch.float32
    difference = (actual.cpu() - exact).abs()
    assert float(difference.mean()) < 0.05
    assert float(difference.max()) < 0.5


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_blocks_give_the_same(name: str, tmp_path: Path) -> None:
    directory = write_family(name, tmp_path, SERVED)
    plain, compiled = (load_policy(directory, torch.float32, 64).train().cuda() for _ in range(2))
    for block in compiled.model.get_decoder().layers:
        block.compile()
    for groups in (GROUPS, GROUPS[:1], GROUPS[1:]):
        rows = packed_rows(pack(groups), "cuda")
        torch.testing.assert_close(compiled(rows).logps, plain(rows).logps, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_takes_a_fraction_of_the_memory_of_full_logits(dtype: torch.dtype) -> None:
    rows, vocabulary = 8192, 128_000
    hidden = torch.randn(rows, 512, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, 512, device="cuda") / 23).to(dtype).requires_grad_()
    target = torch.randint(vocabulary, (rows,), device="cuda")
    by_row = torch.randn(rows, device="cuda")

    def run(whole: bool) -> tuple[int, list[torch.Tensor]]:
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if whole:
            logps = -F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="none")
        else:
            logps = head_scores(hidden, weight, None, target, 512).logps
        (logps * by_row).sum().backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        results = [logps.detach(), hidden.grad.float(), weight.grad.float()]
        return torch.cuda.max_memory_allocated() - before, results

    full, expected = run(whole=True)
    own, actual = run(whole=False)
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).norm() / e.norm()) < (1e-4 if dtype == torch.float32 else 2e-2)
    assert own < 0.15 * full
