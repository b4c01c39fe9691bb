"""The exported policy is a Hugging Face model that says what the trained one says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ray.models.builtin import builtin_model
from dpo_ray.models.load import load_policy
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
