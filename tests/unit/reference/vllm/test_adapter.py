"""What vLLM is set up for by an adapter, and which adapters it would apply only in part."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.models.adapter import AdaptedLayer, Adapter
from dpo_ray.reference.vllm.engine import lora_options


def adapter(**ranks: int) -> Adapter:
    """Describe an adapter of one module for each rank, named without its place in the model."""
    layers = {f"model.layers.0.self_attn.{name}": AdaptedLayer(6, 6, rank, 1.0) for name, rank in ranks.items()}
    return Adapter(Path("adapter"), "model.adapter=adapter", layers)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [((1,), 1), ((2,), 8), ((8, 9), 16), ((16, 4), 16), ((65,), 128), ((257,), 320), ((512,), 512)],
)
def test_the_rank_is_the_least_of_vllms_that_holds_all_layers(ranks: tuple[int, ...], expected: int) -> None:
    options = lora_options(adapter(**dict(zip(["q_proj", "v_proj"], ranks, strict=False))))
    assert options["max_lora_rank"] == expected
    assert options["lora_target_modules"] == ["q_proj", "v_proj"][: len(ranks)]


def test_a_rank_beyond_vllms_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 513 is above vLLM's limit of 512"):
        lora_options(adapter(q_proj=8, v_proj=513))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "embed_out", "wte"])
def test_an_adapter_of_the_head_or_the_embeddings_is_refused(module: str) -> None:
    with pytest.raises(ConfigError, match=f"the adapter changes {module}, which vLLM leaves out") as error:
        lora_options(adapter(q_proj=8, **{module: 8}))
    assert "reference.engine=trainer" in error.value.fix
