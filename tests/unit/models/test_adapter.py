"""LoRA adapters: merged as PEFT itself merges them, identified by what they compute, and refused where they are more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dpo_ray.config.model import ModelConfig
from dpo_ray.errors import ConfigError
from dpo_ray.models.adapter import CONFIG, WEIGHTS, adapter_directory, check_targets, read_adapter
from dpo_ray.models.load import load_policy, model_directory, model_identity
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.schedule.micro_batch import pack
from tests.helpers.families import plain_model, plain_token_logps, trying_groups

ATTENTION = ["q_proj", "v_proj"]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 6},
    "rslora": {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.3},
    "patterns": {
        "target_modules": [*ATTENTION, "down_proj"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 7},
        "alpha_pattern": {"v_proj": 20, r"0\.mlp\.down_proj": 3},
    },
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": [1], "r": 1, "init_lora_weights": "gaussian"},
}


def write_adapter(model: Path, place: Path, **form: Any) -> Path:
    """Write an adapter with PEFT; its random weights are large enough to change log-probs."""
    torch.manual_seed(1)
    adapted = get_peft_model(plain_model(model), LoraConfig(task_type="CAUSAL_LM", **form))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def adapter(family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sound adapter of the tiny Llama. Tests that change it use a copy."""
    return write_adapter(family("llama"), tmp_path_factory.mktemp("adapter") / "plain", **FORMS["plain"])


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def rewrite(place: Path, **changes: Any) -> Path:
    settings = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps({**settings, **changes}))
    return place


def reweigh(place: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    weights = change(load_file(place / WEIGHTS))
    (place / WEIGHTS).unlink()
    save_file({name: w.contiguous() for name, w in weights.items()}, place / WEIGHTS)
    return place


def refusal(place: Path, model: Path | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        check_targets(read_adapter(place), model or place)
    assert refused.value.where == f"model.adapter={place}"
    assert refused.value.fix
    return refused.value.what


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_it_is_merged_as_peft_merges_it(name: str, form: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    model = family(name)
    place = write_adapter(model, tmp_path / "adapter", **FORMS[form])
    expected = PeftModel.from_pretrained(plain_model(model), place).merge_and_unload().state_dict()
    before = plain_model(model).state_dict()
    merged = load_policy(model, torch.float32, 16, place).model.state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[n], expected[n]) for n in expected)
    assert any(not torch.equal(merged[n], before[n]) for n in before)


@pytest.mark.parametrize("name", ["llama", "phi3", "phi"])
def test_its_log_probs_are_those_of_the_unmerged_adapter(
    name: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    model, groups = family(name), trying_groups()
    place = write_adapter(model, tmp_path / "adapter", **FORMS["rslora"])
    with torch.no_grad():
        expected = plain_token_logps(PeftModel.from_pretrained(plain_model(model), place).eval(), groups)
        logps = load_policy(model, torch.float32, 16, place)(packed_rows(pack(groups))).logps
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    check_targets(read_adapter(place), model)


def test_in_bfloat16_the_sum_is_rounded_and_the_rotary_frequencies_are_not(
    adapter: Path, family: Callable[[str], Path]
) -> None:
    exact = load_policy(family("llama"), torch.float32, 16, adapter)
    rounded = load_policy(family("llama"), torch.bfloat16, 16, adapter)
    exact_buffers = dict(exact.named_buffers())
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16())
    assert exact_buffers
    assert all(torch.equal(b, exact_buffers[n]) for n, b in rounded.named_buffers())


def test_an_adapter_is_what_it_computes(adapter: Path, copy: Path, family: Callable[[str], Path]) -> None:
    def identity(place: Path | None) -> str:
        return model_identity(ModelConfig(path=str(family("llama")), adapter=place and str(place)))

    same = identity(adapter)
    assert identity(None) != same
    assert identity(copy) == same
    unfelt = {"base_model_name_or_path": "elsewhere", "lora_dropout": 0.5, "target_modules": ATTENTION[::-1]}
    assert identity(rewrite(copy, **unfelt, inference_mode=False, peft_version="9", revision="x")) == same
    others = {
        identity(rewrite(copy, lora_alpha=7)),
        identity(rewrite(copy, lora_alpha=6, use_rslora=True)),
        identity(rewrite(copy, use_rslora=False, alpha_pattern={"q_proj": 1})),
        identity(reweigh(rewrite(copy, alpha_pattern={}), lambda w: {n: 2 * t for n, t in w.items()})),
    }
    assert len(others) == 4
    assert same not in others


def test_where_there_is_none(tmp_path: Path) -> None:
    def found(place: str | None) -> Path | None:
        return adapter_directory(ModelConfig(path="builtin:sentiment_llama", adapter=place))

    assert found(None) is None
    assert found(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match=r"model.adapter=./nothing: there is no such directory\n"):
        found("./nothing")
    with pytest.raises(ConfigError, match=r"not fetched from the hub\n.*hf download some-one/lora-1"):
        found("some-one/lora-1")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"some_later_kind": {"x": 1}}, "some_later_kind"),
        ({"r": 5}, "rank 4 (A) and 4 (B), but adapter_config.json sets rank 5"),
        ({"rank_pattern": {"v_proj": 3}}, "self_attn.v_proj` have rank 4"),
        ({"rank_pattern": {"v_proj(": 3}}, "rank_pattern has an invalid pattern: "),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"alpha_pattern": {"v_proj": 0}}, "alpha_pattern.v_proj is 0"),
    ],
)
def test_what_is_not_plain_lora_is_refused(changes: dict[str, Any], says: str, copy: Path) -> None:
    assert says in refusal(rewrite(copy, **changes))


def test_another_kind_that_peft_wrote_is_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(plain_model(family("llama")), prompts).save_pretrained(tmp_path / "prompts")
    assert "type PROMPT_TUNING" in refusal(tmp_path / "prompts")


@pytest.mark.parametrize("form", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}])
def test_more_than_lora_that_peft_wrote_is_refused(
    form: dict[str, Any], family: Callable[[str], Path], tmp_path: Path
) -> None:
    """The configuration says it; without what it says there, the weights do."""
    place = write_adapter(family("phi"), tmp_path / "adapter", target_modules=ATTENTION, r=2, **form)
    assert "more than LoRA of linear layers" in refusal(place)
    assert "not part of LoRA of a linear layer" in refusal(
        rewrite(place, use_dora=False, modules_to_save=None, bias="none")
    )


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_head_and_embeddings_are_refused(target: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    place = write_adapter(family("llama"), tmp_path / "adapter", target_modules=[target], r=2)
    assert "not part of LoRA of a linear layer (embeddings" in refusal(place)


def test_a_head_that_is_adapted_like_any_layer_is_refused(copy: Path, family: Callable[[str], Path]) -> None:
    head = {"A": torch.ones(4, 32), "B": torch.ones(61, 4)}
    reweigh(copy, lambda w: {f"base_model.model.lm_head.lora_{m}.weight": t for m, t in head.items()})
    assert "the head and the embeddings cannot have an adapter" in refusal(copy, family("llama"))


def test_broken_files_are_refused(copy: Path) -> None:
    weights = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(weights[:-100])
    assert "cannot be read" in refusal(copy)
    (copy / WEIGHTS).write_bytes(weights)
    reweigh(copy, lambda w: {n: t for n, t in w.items() if "layers.1.self_attn.q_proj.lora_B" not in n})
    assert "one of the two matrices of `model.layers.1.self_attn.q_proj`" in refusal(copy)
    reweigh(copy, lambda w: {})
    assert "no weights" in refusal(copy)
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    assert "pickled weights are not read" in refusal(copy)
    (copy / CONFIG).write_text("{")
    assert "cannot be read" in refusal(copy)
    (copy / CONFIG).write_text("[]")
    assert "not a JSON object" in refusal(copy)
    (copy / CONFIG).unlink()
    assert "adapter_config.json cannot be read" in refusal(copy)


def test_an_adapter_of_another_model_is_refused(adapter: Path, copy: Path, family: Callable[[str], Path]) -> None:
    assert "no module `model.layers.0.self_attn.q_proj`" in refusal(adapter, family("phi3"))
    assert "features, but the model's layer has" in refusal(adapter, family("qwen3"))
    # This is also found if only loading sees the model.
    with pytest.raises(ConfigError, match="features, but the model's layer has"):
        load_policy(family("qwen3"), torch.float32, 16, adapter)
    reweigh(copy, lambda w: {n.replace("self_attn.q_proj", "input_layernorm"): t for n, t in w.items()})
    assert "not a linear layer" in refusal(copy, family("llama"))


def test_an_adapter_is_no_model(adapter: Path, family: Callable[[str], Path], tmp_path: Path) -> None:
    """Where PEFT is installed, transformers would add the adapter that lies beside a model without a word."""
    both = Path(shutil.copytree(family("llama"), tmp_path / "both"))
    shutil.copyfile(adapter / CONFIG, both / CONFIG)
    for place in (adapter, both):
        with pytest.raises(ConfigError, match=r"model.path=.*the model directory contains an adapter"):
            model_directory(ModelConfig(path=str(place)))
