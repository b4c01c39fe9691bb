"""A model's files are checked before anything starts: what cannot be loaded later is named with its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_ray.config.train import LoraConfig
from dpo_ray.errors import ConfigError
from dpo_ray.models.builtin import builtin_model
from dpo_ray.models.files import check_architecture, check_weights, read_config
from dpo_ray.models.lora import check_targets

SOURCE = builtin_model("sentiment_llama")
TOKENS = {"a": 0, "b": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOURCE, tmp_path / "model"))


def cut(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def lengthen(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as stream:
        stream.write(b"more")


def long_header(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes((1 << 40).to_bytes(8, "little") + weights.read_bytes()[8:])


def no_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")


def empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def lies(model: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 40]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12345678")


def index_of_nothing(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-00002.safetensors"}}))


def bad_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("[" * 100_000)


def with_config(**changes: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "model.safetensors is damaged or incomplete"),
        (lengthen, "model.safetensors is damaged or incomplete"),
        (long_header, "model.safetensors is damaged or incomplete: the file is shorter than its header says"),
        (no_header, "model.safetensors is damaged or incomplete"),
        (empty, "model.safetensors is damaged or incomplete"),
        (lies, "model.safetensors is damaged or incomplete"),
        (index_of_nothing, "names model-00002.safetensors, which is missing"),
        (bad_index, "model.safetensors.index.json cannot be read"),
        (with_config(vocab_size=10**12), "rows, but config.json gives a vocabulary of 1000000000000"),
        (with_config(model_type="nobody_knows"), "transformers cannot read config.json"),
        (with_config(num_attention_heads="many"), "transformers cannot read config.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_named(damage: Callable[[Path], None], says: str, model: Path) -> None:
    check_weights(model, TOKENS, "model.path=here")
    damage(model)
    with pytest.raises(ConfigError, match="path=here") as caught:
        check_weights(model, TOKENS, "model.path=here")
    assert says in str(caught.value)


def test_a_token_without_a_row_of_the_embedding_is_named(model: Path) -> None:
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    check_weights(model, {**TOKENS, "last": size - 1}, "here")
    with pytest.raises(ConfigError, match=f"token 'first' has the id {size}, but the embedding has {size} rows"):
        check_weights(model, {**TOKENS, "second": size + 1, "first": size}, "here")


@pytest.mark.parametrize("text", ["{", "[1]", '{"a":' * 100_000, "3"])
def test_a_config_that_is_no_object_is_one_error(text: str, model: Path) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_config(model, "here")


@pytest.mark.parametrize(
    ("modules", "says"), [(("wq",), "no adapter can be added"), (("lm_head",), "cannot have an adapter")]
)
def test_layers_that_cannot_have_an_adapter_are_found_without_weights(modules: tuple[str, ...], says: str) -> None:
    check_targets(LoraConfig(target_modules=("q_proj",)), SOURCE)
    check_targets(LoraConfig(), SOURCE)
    with pytest.raises(ConfigError, match=says):
        check_targets(LoraConfig(target_modules=modules), SOURCE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "deepseek_v32", "index_topk": 2048}, "index_topk"),
        ({"model_type": "glm_moe_dsa", "index_topk": 64}, "index_topk"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "qwen3_vl"}, "no causal language model"),
        ({"model_type": "qwen3_5"}, "would lose the part of `qwen3_5` that reads images"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_an_architecture_that_would_be_wrong_is_refused_without_its_weights(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changes))
    name = "model.visual.blocks.0.attn.qkv.weight"  # of Qwen3.5's multimodal checkpoint
    header = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ConfigError) as error:
        check_architecture(tmp_path, "model.path=here")
    assert words in error.value.what
    assert error.value.where == "model.path=here"


def test_a_reward_model_need_not_be_a_causal_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deberta-v2", "vocab_size": 4}))
    header = json.dumps({"score.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert check_weights(tmp_path, TOKENS, "online.judge.path=here") == 2
    with pytest.raises(ConfigError, match="no causal language model"):
        check_architecture(tmp_path, "model.path=here")
