"""The exported policy is a Hugging Face model that says what the trained one says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ray.config.model import ModelConfig
from dpo_ray.models.builtin import builtin_model
from dpo_ray.models.load import load_policy, tokenizer_identity
from dpo_ray.train.export import gather_policy, write_policy
from tests.helpers.training import make_groups, make_policy, rows_of

SOURCE = builtin_model("sentiment_llama")


@torch.no_grad()
def test_what_is_written_reads_back_as_what_was_trained(tmp_path: Path) -> None:
    policy, rows = make_policy(), rows_of(make_groups(3))
    for parameter in policy.parameters():
        parameter.mul_(1.01)
    write_policy(policy, gather_policy(policy, torch.float32), torch.float32, SOURCE, "{{ messages }}", tmp_path)
    assert torch.equal(load_policy(tmp_path, torch.float32, 1024)(rows).logps, policy(rows).logps)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)  # by anybody, with transformers alone
    assert plain.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == "{{ messages }}"
    text = "The film was good"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(SOURCE)(text).input_ids
    assert not list(tmp_path.glob("*.bin"))


def test_weights_are_written_in_the_type_they_are_served_in(tmp_path: Path) -> None:
    policy = make_policy()
    weights = gather_policy(policy, torch.bfloat16)
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert all(not name.startswith("model.model.") for name in weights)
    write_policy(policy, weights, torch.bfloat16, SOURCE, "plain", tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    before = json.loads((SOURCE / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    assert {k for k in before if before[k] != after.get(k)} == {"dtype"}
    assert "dpo_ray" not in (tmp_path / "config.json").read_text()  # our attention is no business of the reader's
    assert not (tmp_path / "chat_template.jinja").exists()


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("trained", ["{{ messages }}", "name:tool_use"])
def test_every_named_template_is_exported_and_the_trained_one_is_the_default(
    trained: str, in_files: bool, tmp_path: Path
) -> None:
    source, target = Path(shutil.copytree(SOURCE, tmp_path / "source")), tmp_path / "target"
    target.mkdir()
    named = {"default": "{{ messages }} as it was", "tool_use": "{{ tools }}{{ messages }}", "../out": "{{ 1 }}"}
    config = json.loads((source / "tokenizer_config.json").read_text())
    if in_files:
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "tool_use.jinja").write_text(named["tool_use"])
        (source / "chat_template.jinja").write_text(named["default"])
    else:
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    policy = make_policy()
    write_policy(policy, gather_policy(policy, torch.float32), torch.float32, source, trained, target)
    templates = AutoTokenizer.from_pretrained(target).chat_template
    default = named["tool_use"] if trained == "name:tool_use" else trained
    assert templates == {"default": default, "tool_use": named["tool_use"]}
    assert not list(tmp_path.rglob("out.jinja"))


def test_a_named_template_is_part_of_the_tokenizers_identity(tmp_path: Path) -> None:
    source = Path(shutil.copytree(SOURCE, tmp_path / "source"))
    before = tokenizer_identity(ModelConfig(path=str(source)))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    with_one = tokenizer_identity(ModelConfig(path=str(source)))
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}!")
    assert len({before, with_one, tokenizer_identity(ModelConfig(path=str(source)))}) == 3
