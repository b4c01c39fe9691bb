"""The synthetic world: its labels are Bradley-Terry, its splits are apart, its model writes its language."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ray.data import synthetic
from dpo_ray.errors import ConfigError
from dpo_ray.models.builtin import builtin_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_model("sentiment_llama"))


@pytest.fixture(scope="module")
def pairs():
    return list(synthetic.preference_pairs(4_000, seed=0, split="train"))


def test_pairs_are_a_function_of_seed_and_split(pairs):
    shorter = list(synthetic.preference_pairs(50, seed=0, split="train"))
    assert shorter == pairs[:50]
    assert shorter != list(synthetic.preference_pairs(50, seed=1, split="train"))
    assert list(synthetic.documents(5, seed=3)) == list(synthetic.documents(5, seed=3))


def test_no_prompt_is_in_both_splits_whatever_the_seed(pairs):
    held_out = {row["prompt"] for seed in (0, 1) for row in synthetic.preference_pairs(1_000, seed, "eval")}
    held_out.update(synthetic.prompts(1_000, seed=2, split="eval"))
    assert held_out.isdisjoint(row["prompt"] for row in pairs)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        next(synthetic.preference_pairs(1, seed=0, split="test"))


def test_pairs_differ_and_repeat_hardly_ever(pairs):
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    completions = [row[key] for row in pairs for key in ("chosen", "rejected")]
    assert len(set(completions)) > 0.999 * len(completions)


def test_labels_agree_with_bradley_terry(pairs):
    """Where the better text wins with probability p, it is chosen in a share p of the pairs, to 4 sigma."""
    wins = expected = variance = 0.0
    for row in pairs:
        chosen, rejected = (synthetic.true_reward(row["prompt"], row[key]) for key in ("chosen", "rejected"))
        reward_gap = chosen - rejected
        better = 1.0 / (1.0 + math.exp(-abs(reward_gap)))
        wins += 1.0 if reward_gap > 0 else 0.5 if reward_gap == 0 else 0.0
        expected += better
        variance += better * (1.0 - better)
    assert abs(wins - expected) < 4.0 * math.sqrt(variance)
    assert 0.6 < wins / len(pairs) < 0.95  # informative, yet noisy


def test_the_reward_is_centred_and_takes_any_text(pairs):
    completions = [row[key] for row in pairs for key in ("chosen", "rejected")]
    assert abs(statistics.mean(synthetic.true_reward("", text) for text in completions)) < 0.15
    assert synthetic.true_reward("", " was Superb. I hated it, zzz \ufffd 4") == 0.0
    assert synthetic.true_reward("a terrible prompt", "") == 0.0
    assert synthetic.true_reward("", " goodness") == 0.0


def test_the_grammar_parses_what_it_writes_and_nothing_else():
    texts = list(synthetic.documents(300, seed=1))
    assert all(synthetic.is_grammatical(text) for text in texts)
    assert not any(synthetic.is_grammatical(text + ".") for text in texts)
    stuttering = [text.replace(" was", " was was") for text in texts if " was" in text]
    assert not any(synthetic.is_grammatical(text) for text in stuttering)


def test_encoding_prompt_and_completion_is_concatenation(tokenizer, pairs):
    for row in itertools.islice(pairs, 500):
        joined = tokenizer.encode(row["prompt"] + row["chosen"])
        assert joined == tokenizer.encode(row["prompt"]) + tokenizer.encode(row["chosen"])
        assert tokenizer.decode(joined) == row["prompt"] + row["chosen"]
    foreign = "any text: \u00e9\u6620\U0001f3ac"
    assert tokenizer.decode(tokenizer.encode(foreign)) == foreign


def test_the_model_has_learnt_the_grammar(tokenizer):
    """Held out, a completion costs the model about the grammar's entropy, and a unigram model far more."""
    model = AutoModelForCausalLM.from_pretrained(builtin_model("sentiment_llama")).eval()
    rows = list(synthetic.preference_pairs(200, seed=5, split="eval"))
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    completions = [[*tokenizer.encode(row["chosen"]), tokenizer.eos_token_id] for row in rows]
    counts = torch.bincount(torch.tensor(list(itertools.chain(*completions)))).double()
    unigram_nats = -float(torch.xlogy(counts, counts / counts.sum()).sum()) / len(rows)
    nats = statistics.mean(_completion_nats(model, p, c) for p, c in zip(prompts, completions, strict=True))
    entropy = synthetic.entropy_nats("completion")
    assert nats < 0.5 * unigram_nats
    assert abs(nats - entropy) < 0.1 * entropy  # the 200 texts' own entropy scatters by 1.3 percent


def test_an_unknown_builtin_model_is_named_with_those_that_exist():
    with pytest.raises(ConfigError, match="sentiment_llama"):
        builtin_model("sentiment_lama")


@torch.no_grad()
def _completion_nats(model: torch.nn.Module, prompt_ids: list[int], completion_ids: list[int]) -> float:
    ids = torch.tensor([prompt_ids + completion_ids])
    logps = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return -float(logps.gather(-1, torch.tensor(completion_ids)[:, None]).sum())
