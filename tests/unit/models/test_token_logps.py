"""Packing and prompt sharing are exact: log-probs and gradients are those of every sequence run alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_ray.config.train import LoraConfig
from dpo_ray.data.groups import Group
from dpo_ray.models.load import load_policy
from dpo_ray.models.lora import add_lora
from dpo_ray.models.packed_rows import Layout, packed_rows
from dpo_ray.models.token_logps import TokenLogps, sum_by_completion
from dpo_ray.schedule.micro_batch import pack
from tests.helpers.families import VOCABULARY, make_group, plain_model, plain_token_logps, trying_groups

FAMILIES = [
    "llama",
    "llama3",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "phi4",
    "granite",
    "cohere",
]
Family = Callable[[str], Path]


def policy_of(directory: Path, chunk_tokens: int = 1024, layout: Layout = "shared") -> TokenLogps:
    return load_policy(directory, torch.float32, chunk_tokens, layout=layout).train()


def row_weights(rows: int) -> Tensor:
    """Weigh the tokens differently, so that no two of their gradients can be exchanged unnoticed."""
    return torch.from_numpy(np.random.default_rng(0).normal(size=rows).astype(np.float32))


def gradients(model: nn.Module, token_logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (token_logps * row_weights(len(token_logps))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def add_random_lora(model: PreTrainedModel) -> None:
    """Add an adapter whose product is not zero, as it is after some steps; the same on every call."""
    add_lora(model, LoraConfig(rank=2, alpha=4), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2, generator=generator)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "lora"])
def test_every_layout_equals_every_sequence_alone(name: str, layout: Layout, adapted: bool, family: Family) -> None:
    plain, policy, groups = plain_model(family(name)), policy_of(family(name), layout=layout), trying_groups()
    assert policy.layout == layout
    if adapted:
        for model in (plain, policy.model):
            add_random_lora(model)
    expected = plain_token_logps(plain, groups)
    actual = policy(packed_rows(pack(groups), "cpu", layout)).logps
    assert actual.dtype == torch.float32
    assert float(expected.detach().std()) > 0.1  # the model is no uniform one, whose log-probs any mask would give
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    expected_gradients, actual_gradients = gradients(plain, expected), gradients(policy.model, actual)
    assert expected_gradients.keys() == actual_gradients.keys()
    assert any(float(g.norm()) > 0.1 for g in expected_gradients.values())
    for parameter, gradient in expected_gradients.items():
        if float(gradient.norm()) > 1e-4:  # a key bias has no gradient but rounding
            assert relative_error(actual_gradients[parameter], gradient) < 1e-4, parameter
        else:
            torch.testing.assert_close(actual_gradients[parameter], gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_the_sliding_window_is_felt(name: str, family: Family) -> None:
    """Or the comparison above would say nothing about windows: token 0 is out of the second block's reach."""
    group = make_group(1, 14, [6, 4])
    other = replace(group, prompt_ids=np.concatenate([[(group.prompt_ids[0] + 7) % VOCABULARY], group.prompt_ids[1:]]))
    wide = plain_model(family(name))
    expected = plain_token_logps(wide, [group]) - plain_token_logps(wide, [other])
    policy = policy_of(family(name))
    actual = policy(packed_rows(pack([group]))).logps - policy(packed_rows(pack([other]))).logps
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert bool((expected[-1:].abs() < 1e-6).all()) == (name == "mistral")  # gemma2's second layer sees all


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("chunk_tokens", [1, 4])
def test_chunks_of_the_head_change_nothing(name: str, chunk_tokens: int, family: Family) -> None:
    rows = packed_rows(pack(trying_groups()))
    whole, chunked = policy_of(family(name)), policy_of(family(name), chunk_tokens)
    expected, actual = whole(rows).logps, chunked(rows).logps
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
    expected_gradients = gradients(whole, expected)
    for parameter, gradient in gradients(chunked, actual).items():
        if float(expected_gradients[parameter].norm()) > 1e-4:
            assert relative_error(gradient, expected_gradients[parameter]) < 1e-5, parameter
    with torch.no_grad():
        torch.testing.assert_close(chunked(rows).logps, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradient_checkpointing_changes_nothing(name: str, family: Family) -> None:
    rows = packed_rows(pack(trying_groups()))
    kept, recomputed = policy_of(family(name), chunk_tokens=5), policy_of(family(name), chunk_tokens=5)
    recomputed.model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    recomputed.model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    expected, actual = kept(rows).logps, recomputed(rows).logps
    assert torch.equal(actual, expected)
    expected_gradients, actual_gradients = gradients(kept, expected), gradients(recomputed, actual)
    assert len(calls) == 2  # forward, and again in the backward pass
    assert all(torch.equal(actual_gradients[n], g) for n, g in expected_gradients.items())


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_group_does_not_see_its_neighbours(name: str, family: Family) -> None:
    policy = policy_of(family(name))
    left, right, other = make_group(1, 8, [4, 6]), make_group(2, 5, [3, 7, 2]), make_group(9, 5, [3, 7, 2])
    for changed, kept in (([left, other], slice(0, 10)), ([other, right], slice(12, 24))):
        before = policy(packed_rows(pack([left, right] if changed[0] is left else [right, right]))).logps
        after = policy(packed_rows(pack(changed))).logps
        assert torch.equal(before[kept], after[kept])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_completion_does_not_see_its_siblings(name: str, family: Family) -> None:
    policy, group = policy_of(family(name)), make_group(1, 8, [4, 6, 5])
    other = make_group(7, 8, [4, 6, 5])
    changed = replace(group, completion_ids=(group.completion_ids[0], other.completion_ids[1], group.completion_ids[2]))
    before, after = policy(packed_rows(pack([group]))).logps, policy(packed_rows(pack([changed]))).logps
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[10:], after[10:])
    assert not torch.allclose(before[4:10], after[4:10])


def test_the_order_of_groups_is_the_order_of_rows(family: Family) -> None:
    policy, groups = policy_of(family("llama")), trying_groups()
    forwards, backwards = policy(packed_rows(pack(groups))).logps, policy(packed_rows(pack(groups[::-1]))).logps
    sizes = [sum(len(c) for c in g.completion_ids) for g in groups]
    mirrored = torch.cat(list(backwards.split(sizes[::-1]))[::-1])
    torch.testing.assert_close(mirrored, forwards, rtol=0, atol=1e-5)


def test_sums_by_completion_are_kept_in_double() -> None:
    group = Group(
        b"", np.array([1], np.int32), (np.ones(4000, np.int32), np.ones(3, np.int32)), np.zeros(2, np.float32)
    )
    rows = packed_rows(pack([group]))
    values = torch.from_numpy(-np.random.default_rng(0).uniform(0, 3, 4003).astype(np.float32))
    expected = [values[:4000].double().sum(), values[4000:].double().sum()]
    assert sum_by_completion(values, rows).tolist() == [float(v.float()) for v in expected]
