"""Adapters that are trained: nothing at first, alone or merged they are the same policy, and PEFT reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from dpo_ray.config.train import LoraConfig
from dpo_ray.errors import ConfigError
from dpo_ray.models.load import load_policy
from dpo_ray.models.lora import add_lora
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.schedule.micro_batch import pack
from dpo_ray.train.export import gather_policy, write_policy
from tests.helpers.families import plain_model, plain_token_logps, trying_groups

CONFIG = LoraConfig(rank=4, alpha=8)


def adapted(model: Path, config: LoraConfig = CONFIG) -> TokenLogps:
    policy = load_policy(model, torch.float32, 16)
    add_lora(policy.model, config, seed=7)
    return policy.train()


def moved(policy: TokenLogps) -> TokenLogps:
    """Stand for training: give the second matrices, which begin at zero, some values."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    return policy


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma"])
def test_an_adapter_is_nothing_at_first_and_alone_has_gradients(name: str, family: Callable[[str], Path]) -> None:
    rows = packed_rows(pack(trying_groups()))
    policy, base = adapted(family(name)), load_policy(family(name), torch.float32, 16)
    assert torch.equal(policy(rows).logps, base(rows).logps)
    policy(rows).logps.sum().backward()
    trained = {n for n, p in policy.named_parameters() if p.grad is not None}
    assert trained
    assert all(".lora_" in n for n in trained)
    assert not any("lm_head" in n or "embed" in n for n in trained)


def test_it_learns_and_the_weights_below_it_stay(family: Callable[[str], Path]) -> None:
    rows, policy = packed_rows(pack(trying_groups())), adapted(family("llama"))
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    optimizer, losses = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = -policy(rows).logps.mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[n]) != (".lora_" in n) for n, p in policy.named_parameters())


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_peft_reads_the_adapter_alone(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    policy = moved(adapted(family(name)))
    weights = gather_policy(policy, torch.float32, CONFIG)
    write_policy(policy, weights, torch.float32, family(name), "plain", tmp_path, CONFIG, "some/base")
    assert not (tmp_path / "config.json").exists()
    read = PeftModel.from_pretrained(plain_model(family(name)), str(tmp_path)).eval()
    assert read.peft_config["default"].base_model_name_or_path == "some/base"
    with torch.no_grad():
        expected = plain_token_logps(read, trying_groups())
        actual = policy(packed_rows(pack(trying_groups()))).logps
        own = load_policy(family(name), torch.float32, 16, tmp_path)(packed_rows(pack(trying_groups()))).logps
        base = load_policy(family(name), torch.float32, 16)(packed_rows(pack(trying_groups()))).logps
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(own, expected, rtol=0, atol=2e-5)
    assert float((actual - base).abs().max()) > 1e-2


def test_merged_it_is_the_same_policy(family: Callable[[str], Path], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"merge": True})
    policy = moved(adapted(family("llama"), config))
    weights = gather_policy(policy, torch.float32, config)
    write_policy(policy, weights, torch.float32, family("llama"), "plain", tmp_path, config)
    rows = packed_rows(pack(trying_groups()))
    with torch.no_grad():
        actual = load_policy(tmp_path, torch.float32, 16)(rows).logps
        torch.testing.assert_close(actual, policy(rows).logps, rtol=0, atol=2e-5)


def test_rounding_comes_last(family: Callable[[str], Path]) -> None:
    """What bfloat16 cannot say is kept in an adapter, and in a merged model's sum until it is complete."""
    policy = moved(adapted(family("llama")))
    layer = policy.model.get_submodule("model.layers.0.self_attn.q_proj")
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    alone = gather_policy(policy, torch.bfloat16, CONFIG)
    assert torch.equal(alone["model.layers.0.self_attn.q_proj.lora_A.default.weight"], a)
    whole = gather_policy(policy, torch.bfloat16, CONFIG.model_copy(update={"merge": True}))
    exact = layer.base_layer.weight.double() + 2 * (b.double() @ a.double())  # alpha / rank = 2
    merged = whole["model.layers.0.self_attn.q_proj.weight"]
    assert merged.dtype == torch.bfloat16
    assert float((merged == exact.bfloat16()).double().mean()) > 0.999  # but for ties that float32 sees otherwise
    assert not any(".lora_" in name or ".base_layer" in name for name in whole)


def test_the_same_seed_draws_the_same_adapter(family: Callable[[str], Path]) -> None:
    first, second = (dict(adapted(family("llama")).named_parameters()) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_layers_that_are_not_there_are_refused(family: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="no adapter can be added"):
        adapted(family("llama"), LoraConfig(target_modules=("query_projection",)))


def test_an_adapter_of_the_head_is_refused(family: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="head"):
        adapted(family("llama"), LoraConfig(target_modules=("q_proj", "lm_head")))
