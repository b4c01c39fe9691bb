"""What a step asks for: tokens counted one by one, operations as torch counts those of a plain model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from dpo_ray.models.work import ModelShape, Work
from dpo_ray.schedule.files import filler
from dpo_ray.schedule.micro_batch import pack
from tests.helpers.families import TINY, family_config, make_group

FAMILIES = ["llama", "llama3", "qwen2", "qwen3", "gemma2", "phi3"]
EXPERTS = MixtralConfig(**TINY.common, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)


def model_of(config) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def counted(model: PreTrainedModel, prompt: int, completion: int) -> tuple[int, int]:
    """Operations of matrix products and of attention's batched ones, forward and backward; the head on the completion alone."""
    ids = torch.randint(3, TINY.vocabulary, (1, prompt + completion))
    with FlopCounterMode(display=False) as counter:
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        model.get_output_embeddings()(hidden[0, -completion:]).sum().backward()
    found = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in found.items() if str(op).split(".")[-1] in ("mm", "addmm"))
    return matrices, sum(n for op, n in found.items() if str(op).endswith("bmm"))


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family: str) -> None:
    model, prompt, completion = model_of(family_config(family)), 9, 7
    shape = ModelShape.of(model)
    matrices, attention = counted(model, prompt, completion)
    tokens = prompt + completion
    whole = 12 * shape.attention_width * tokens * tokens  # eager attention computes what is masked too
    rotations = attention - whole  # a model computes its rotary angles by a batched product
    assert 0 <= rotations <= tokens * 1000
    seen = 12 * shape.attention_width * tokens * (tokens + 1) / 2
    assert shape.flops(prompt, [completion]) - seen == matrices


def test_frozen_weights_have_no_gradient_to_compute() -> None:
    model = model_of(family_config("llama"))
    model.requires_grad_(False)
    model.get_decoder().layers[0].self_attn.q_proj.weight.requires_grad_(True)
    shape, all_trained = ModelShape.of(model), ModelShape.of(model_of(family_config("llama")))
    assert shape.trained_weights == 32 * 32
    assert shape.frozen_weights + shape.trained_weights == all_trained.trained_weights
    assert shape.flops(9, [7]) < all_trained.flops(9, [7])


def test_of_experts_those_that_are_chosen_count() -> None:
    model = model_of(EXPERTS)
    weights = {n: p.numel() for n, p in model.get_decoder().layers.named_parameters() if p.ndim > 1}
    experts = sum(n for name, n in weights.items() if ".experts." in name)
    assert experts > 0
    assert ModelShape.of(model).trained_weights == sum(weights.values()) - experts // 2


LENGTHS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=5
)


@given(LENGTHS)
def test_tokens_of_each_layout(lengths: list[tuple[int, list[int]]]) -> None:
    shape = ModelShape(3, 5, 7, True, 11)
    work = Work.of(pack([make_group(i, p, c) for i, (p, c) in enumerate(lengths)]), shape)
    sequences = [p + n for p, c in lengths for n in c]
    assert work.shared_tokens == sum(p + sum(c) for p, c in lengths)
    assert work.packed_tokens == sum(sequences)
    assert work.padded_tokens == max(sequences) * len(sequences)
    assert work.flops == pytest.approx(sum(shape.flops(p, c) for p, c in lengths))


def test_a_filler_is_no_work() -> None:
    assert Work.of(filler(), ModelShape(3, 5, 7, True, 11)) == Work()
