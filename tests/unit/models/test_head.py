"""The head in chunks, against log_softmax and autograd over the whole matrix of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_ray.models.head import head_scores

ROWS, HIDDEN, VOCABULARY = 8, 6, 11


def inputs(
    rows: int, dtype: torch.dtype, *, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    target = torch.randint(VOCABULARY, (rows,), generator=generator)
    return drawn(rows, HIDDEN), drawn(VOCABULARY, HIDDEN), drawn(VOCABULARY) if bias else None, target, drawn(rows)


def whole(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(dim=1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return logp.gather(1, target[:, None])[:, 0], entropy, logp.exp().square().sum(dim=1).log()


@pytest.mark.parametrize("rows", [1, 7, ROWS])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (0.5, 2.0)])
def test_scores_and_gradients_are_those_of_the_whole_matrix(
    rows: int, chunk: int, bias: bool, scale: float, softcap: float | None
) -> None:
    hidden, weight, b, target, by_row = inputs(rows, torch.float64, bias=bias)
    actual = head_scores(hidden, weight, b, target, chunk, scale, softcap, with_statistics=True)
    expected = whole(hidden, weight, b, target, scale, softcap)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    parameters = [t for t in (hidden, weight, b) if t is not None]
    wanted = torch.autograd.grad(expected[0] @ by_row, parameters)
    for _ in range(2):  # the second time without what the forward pass left
        for a, e in zip(torch.autograd.grad(actual.logps @ by_row, parameters, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(a, e)


def test_statistics_are_made_when_asked_for_alone_and_have_no_gradient() -> None:
    hidden, weight, _, target, _ = inputs(ROWS, torch.float32)
    without = head_scores(hidden, weight, None, target, 3)
    assert without.entropy is None
    assert without.log_collision is None
    scores = head_scores(hidden, weight, None, target, 3, with_statistics=True)
    assert scores.entropy is not None
    assert scores.log_collision is not None
    assert scores.logps.requires_grad
    assert not scores.entropy.requires_grad
    assert not scores.log_collision.requires_grad


def test_extreme_logits_stay_finite() -> None:
    """A certain token: log-prob and entropy 0; a hopeless one: its logit's distance, not -inf."""
    weight = torch.tensor([[300.0], [0.0], [-300.0]], requires_grad=True)
    scores = head_scores(torch.ones(2, 1), weight, None, torch.tensor([0, 2]), 10, with_statistics=True)
    assert scores.logps.tolist() == [0.0, -600.0]
    assert scores.entropy is not None
    assert scores.log_collision is not None
    assert scores.entropy.tolist() == [0.0, 0.0]
    assert scores.log_collision.tolist() == [0.0, 0.0]
    scores.logps.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [-1.0, 0.0, 1.0]


def test_no_rows_give_the_weight_a_gradient_of_zero() -> None:
    """Not none: a rank without completions reduces the same gradients as the others."""
    hidden, weight, bias, target, _ = inputs(0, torch.float32, bias=True)
    head_scores(hidden, weight, bias, target, 4).logps.sum().backward()
    for tensor in (hidden, weight, bias):
        assert tensor is not None
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, target, by_row = inputs(ROWS, torch.float32)
    weight.requires_grad_(False)
    expected = torch.autograd.grad(whole(hidden, weight, None, target, 1.0, None)[0] @ by_row, hidden)[0]
    (head_scores(hidden, weight, None, target, 3).logps @ by_row).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, expected)


def test_bfloat16_weights_have_a_float32_softmax_and_a_gradient_that_is_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(n, 16, generator=generator).bfloat16().float().requires_grad_() for n in (512, 300)]
    target = torch.randint(300, (512,), generator=generator)
    narrow = [t.detach().bfloat16().requires_grad_() for t in exact]
    scores = head_scores(*narrow, None, target, 4)
    expected = whole(*exact, None, target, 1.0, None)[0]
    assert scores.logps.dtype == torch.float32
    # On the CPU the matrix product alone is rounded to bfloat16, as other frameworks round it everywhere.
    rounded = F.linear(*narrow).float().log_softmax(dim=1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(scores.logps, rounded, rtol=0, atol=1e-5)
    assert len(set(scores.logps.tolist())) > 450  # a bfloat16 result would have some hundred values at most
    scores.logps.sum().backward()
    expected.sum().backward()
    for a, e in zip(narrow, exact, strict=True):
        assert a.grad is not None
        assert e.grad is not None
        assert a.grad.dtype == torch.bfloat16
        assert float((a.grad.float() - e.grad).norm() / e.grad.norm()) < 0.01


class LargestMatrix(TorchDispatchMode):
    """Keep the number of rows of the largest matrix of `columns` columns that any operation returns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == self.columns:
            self.rows = max(self.rows, len(out))
        return out


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 2.0)])
def test_no_more_logits_than_those_of_a_chunk_are_ever_made(scale: float, softcap: float | None) -> None:
    hidden, weight, _, target, by_row = inputs(50, torch.float32)
    with LargestMatrix(VOCABULARY) as seen:
        scores = head_scores(hidden, weight, None, target, 4, scale, softcap, with_statistics=True)
        (scores.logps @ by_row).backward()
    assert seen.rows in (4, HIDDEN)  # HIDDEN: the weight, transposed
    with LargestMatrix(VOCABULARY) as seen:
        whole(hidden, weight, None, target, scale, softcap)
    assert seen.rows == 50  # so the watch sees them


def test_the_weights_gradient_comes_once_whatever_the_chunks() -> None:
    hidden, weight, _, target, by_row = inputs(50, torch.float32)
    came: list[int] = []
    weight.register_hook(lambda grad: came.append(len(grad)))
    (head_scores(hidden, weight, None, target, 4).logps @ by_row).backward()
    assert came == [VOCABULARY]
