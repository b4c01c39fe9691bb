"""A tiny random reward model: its scores are transformers' own for each conversation alone, whatever the batch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.judge import RewardModelJudge
from dpo_ray.errors import ConfigError, JudgeError
from dpo_ray.models.builtin import builtin_model
from dpo_ray.online.judges.make import judge_digest, make_judge
from dpo_ray.online.judges.memory import JournalMemory
from dpo_ray.online.judges.protocol import Question, Verdict

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
QUESTIONS = [
    Question("the film was", ("good", "bad and dull , and far too long for what it had to say")),
    Question("i saw it , and the plot , the cast and the end were all", ("great",)),
    Question("it", ("", "is", "was so very very very very good")),
]


def make(path: Path, pad: int | None, template: str | None, labels: int = 1) -> Path:
    """Write a random classifier with the built-in tokenizer."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=704,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=labels,
        pad_token_id=pad,
        initializer_range=0.3,
    )
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(builtin_model("sentiment_llama"))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


def judged(path: Path, memory: Path, questions: list[Question], **changed: object) -> list[Verdict]:
    config = RewardModelJudge.model_validate({"path": str(path), **changed})
    judge = make_judge(config, JournalMemory(Storage(memory), judge_digest(config), "one"))
    verdicts = dict(judge.judge(questions))
    judge.close()
    return [verdicts[i] for i in range(len(questions))]


@torch.inference_mode()
def alone(path: Path, question: Question, completion: str) -> float:
    """Score one conversation by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": completion}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
    else:
        ids = tokenizer(question.prompt + completion, return_tensors="pt")["input_ids"]
    return model(ids).logits[0, 0].item()


@pytest.mark.parametrize("pad", [0, 2, None], ids=["pad token", "pad is end of sequence", "no pad token"])
@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["text", "template"])
def test_scores_are_those_of_each_conversation_alone(tmp_path: Path, pad: int | None, template: str | None) -> None:
    path = make(tmp_path / "model", pad, template)
    expected = [tuple(alone(path, q, c) for c in q.completions) for q in QUESTIONS]
    spread = [s for scores in expected for s in scores]
    assert max(spread) - min(spread) > 0.1
    for size in (1, 2, 3, 16):
        verdicts = judged(path, tmp_path / f"memory-{size}", QUESTIONS, completions_per_batch=size)
        for verdict, scores in zip(verdicts, expected, strict=True):
            assert verdict.scores == pytest.approx(scores, abs=1e-5)


def test_an_encoder_takes_the_two_texts_as_two(tmp_path: Path) -> None:
    path = make(tmp_path / "model", 0, None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.sep_token = "</s>" if tokenizer.convert_tokens_to_ids("</s>") is not None else tokenizer.eos_token
    tokenizer.save_pretrained(path)
    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=704,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    model = BertForSequenceClassification(config).eval()
    (path / "model.safetensors").unlink()
    model.save_pretrained(path)
    expected = []
    with torch.inference_mode():
        for question in QUESTIONS:
            rows = [tokenizer(question.prompt, c, return_tensors="pt")["input_ids"] for c in question.completions]
            expected.append(tuple(model(row).logits.item() for row in rows))
    verdicts = judged(path, tmp_path / "memory", QUESTIONS)
    for verdict, scores in zip(verdicts, expected, strict=True):
        assert verdict.scores == pytest.approx(scores, abs=1e-5)


def test_too_long_is_not_judged(tmp_path: Path) -> None:
    path = make(tmp_path / "model", 0, None)
    whole = judged(path, tmp_path / "memory", QUESTIONS)
    short = judged(path, tmp_path / "memory", QUESTIONS, max_length_tokens=12)
    assert short[0].scores[0] == pytest.approx(whole[0].scores[0], abs=1e-5)
    assert short[0].scores[1] is None
    assert "max_length_tokens=12" in short[0].reason
    assert (whole[0].reason, short[2].reason == "") == ("", None not in short[2].scores)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not 1"):
        judged(make(tmp_path / "three", 0, None, labels=3), tmp_path, QUESTIONS)
    with pytest.raises(ConfigError, match=r"the files lack `score.weight`"):
        judged(builtin_model("sentiment_llama"), tmp_path, QUESTIONS)
    with pytest.raises(ConfigError, match="no such model directory") as caught:
        judged(tmp_path / "nowhere", tmp_path, QUESTIONS)
    assert caught.value.where.startswith("online.judge.path=")


@pytest.mark.parametrize(
    ("template", "detail"),
    [
        ("{{ raise_exception('no answers') }}", "TemplateError: no answers"),
        ("{{ messages[0].content * 10**10 }}", "needed more than 1,024 MiB of memory"),
    ],
)
def test_a_template_that_fails_stops_the_run(template: str, detail: str, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=f"the chat template of the reward model failed: {detail}"):
        judged(make(tmp_path / "model", 0, template), tmp_path / "memory", QUESTIONS)


def test_a_template_that_is_not_valid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the template is not valid") as caught:
        judged(make(tmp_path / "model", 0, "{% for %}"), tmp_path / "memory", QUESTIONS)
    assert caught.value.where.startswith("online.judge.path=")


def test_a_score_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    path = make(tmp_path / "model", 0, None)
    model = LlamaForSequenceClassification.from_pretrained(path)
    model.score.weight.data.fill_(float("inf"))
    model.save_pretrained(path)
    with pytest.raises(JudgeError, match="not finite"):
        judged(path, tmp_path / "memory", QUESTIONS)


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = make(tmp_path / "model", 0, None)
    config = RewardModelJudge(path=str(path))
    copied = Path(shutil.copytree(path, tmp_path / "copy"))
    assert judge_digest(config) == judge_digest(RewardModelJudge(path=str(copied), completions_per_batch=2, replicas=3))
    assert judge_digest(config) != judge_digest(RewardModelJudge(path=str(path), max_length_tokens=5))
    make(copied, 0, TEMPLATE)
    assert judge_digest(config) != judge_digest(RewardModelJudge(path=str(copied)))
