"""Mixtures of experts: the loss that keeps them evenly used is the model's own, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from dpo_ray.models.load import load_policy
from dpo_ray.models.packed_rows import Layout, packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.schedule.micro_batch import pack
from tests.helpers.families import TINY, make_group, plain_model, plain_token_logps, trying_groups

MIXTRAL = MixtralConfig(**TINY.common, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
QWEN3_MOE = Qwen3MoeConfig(
    **TINY.common, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
)
LAYOUTS = ["shared", "packed", "padded"]


@pytest.fixture(params=[MIXTRAL, QWEN3_MOE], ids=lambda c: c.model_type)
def experts(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config: PreTrainedConfig = request.param
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


def policy_of(directory: Path, layout: Layout = "shared") -> TokenLogps:
    return load_policy(directory, torch.float32, 1024, layout=layout).train()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_and_its_gradient_are_the_models_own(experts: Path, layout: Layout) -> None:
    """Of one sequence, without padding, on which all agree what the tokens are."""
    group = make_group(1, 9, [7])
    plain, policy = plain_model(experts), policy_of(experts, layout)
    ids = torch.cat([torch.from_numpy(group.prompt_ids), torch.from_numpy(group.completion_ids[0])])[None].long()
    expected = plain(input_ids=ids, output_router_logits=True, use_cache=False).aux_loss
    scores = policy(packed_rows(pack([group]), "cpu", layout))
    assert scores.router_loss is not None
    torch.testing.assert_close(scores.router_loss, expected)
    expected.backward()
    scores.router_loss.backward()
    own = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert any("gate" in name for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6)


def test_padding_does_not_count(experts: Path) -> None:
    groups = trying_groups()
    packed, padded = (
        policy_of(experts, layout)(packed_rows(pack(groups), "cpu", layout)).router_loss for layout in LAYOUTS[1:]
    )
    assert packed is not None
    torch.testing.assert_close(packed, padded)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_those_of_every_sequence_alone(experts: Path, layout: Layout) -> None:
    policy, groups = policy_of(experts, layout), trying_groups()
    assert policy.layout == layout
    expected = plain_token_logps(plain_model(experts), groups)
    torch.testing.assert_close(policy(packed_rows(pack(groups), "cpu", layout)).logps, expected, rtol=0, atol=1e-5)


def test_it_is_made_in_training_alone(experts: Path) -> None:
    policy, rows = policy_of(experts), packed_rows(pack(trying_groups()))
    with torch.no_grad():
        assert policy(rows).router_loss is None
    assert policy.eval()(rows).router_loss is None


def test_it_survives_recomputed_blocks(experts: Path) -> None:
    rows = packed_rows(pack(trying_groups()))
    kept, recomputed = policy_of(experts), policy_of(experts)
    recomputed.model.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for policy in (kept, recomputed):
        scores = policy(rows)
        assert scores.router_loss is not None
        (scores.logps.sum() + scores.router_loss).backward()
        gradients.append({n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
