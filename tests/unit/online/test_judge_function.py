"""A user's function as judge: how it is called, what it may return, and what is said where it fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.judge import FunctionJudge
from dpo_ray.data.synthetic import true_reward
from dpo_ray.errors import ConfigError, JudgeError
from dpo_ray.online.judges.make import judge_digest, make_judge
from dpo_ray.online.judges.memory import JournalMemory
from dpo_ray.online.judges.protocol import Question, Usage, Verdict

CALLS: list[tuple[list[str], list[str]]] = []


def lengths(prompts: list[str], completions: list[str]) -> list[float]:
    CALLS.append((prompts, completions))
    return [float(len(c)) for c in completions]


def sometimes(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if "?" in c else 1 for c in completions]


def an_array(prompts: list[str], completions: list[str]) -> Sequence[float]:
    return np.arange(len(completions), dtype=np.float32)  # type: ignore[return-value]


def a_tensor(prompts: list[str], completions: list[str]) -> Sequence[float]:
    return torch.arange(len(completions))  # type: ignore[return-value]


def too_few(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0]


def nan(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("nan") for _ in completions]


def text(prompts: list[str], completions: list[str]) -> list[str]:
    return ["good" for _ in completions]


def one_number(prompts: list[str], completions: list[str]) -> float:
    return 1.0


def raises(prompts: list[str], completions: list[str]) -> list[float]:
    raise KeyError("no such prompt")


NOT_CALLABLE = 3


def judged(path: Path, name: str, questions: list[Question], **changed: object) -> list[Verdict]:
    config = FunctionJudge.model_validate({"function": name if "." in name else f"{__name__}.{name}", **changed})
    judge = make_judge(config, JournalMemory(Storage(path), judge_digest(config), "one"))
    verdicts = dict(judge.judge(questions))
    assert judge.usage == Usage()
    judge.close()
    return [verdicts[i] for i in range(len(questions))]


QUESTIONS = [
    Question("p", ("a", "bb")),
    Question("q", ("ccc",)),
    Question("p", ("a", "bb")),
    Question("r", ("d", "e?")),
]


def test_it_is_called_in_batches_and_for_nothing_twice(tmp_path: Path) -> None:
    CALLS.clear()
    first = judged(tmp_path, "lengths", QUESTIONS, questions_per_batch=2)
    assert [v.scores for v in first] == [(1.0, 2.0), (3.0,), (1.0, 2.0), (1.0, 2.0)]
    assert CALLS == [(["p", "p", "q"], ["a", "bb", "ccc"]), (["r", "r"], ["d", "e?"])]
    more = [*QUESTIONS, Question("new", ("x",))]
    assert judged(tmp_path, "lengths", more)[:4] == first
    assert CALLS[2:] == [(["new"], ["x"])]


def test_the_built_in_true_reward(tmp_path: Path) -> None:
    questions = [Question("the film was", ("good", "bad and dull"))]
    (verdict,) = judged(tmp_path, "dpo_ray.data.synthetic.true_rewards", questions)
    assert verdict.scores == tuple(true_reward("the film was", c) for c in questions[0].completions)


def test_none_abstains_and_arrays_count(tmp_path: Path) -> None:
    (verdict,) = judged(tmp_path, "sometimes", QUESTIONS[-1:])
    assert verdict == Verdict((1.0, None), reason="the function abstains")
    assert judged(tmp_path, "an_array", QUESTIONS[:2]) == [Verdict((0.0, 1.0)), Verdict((2.0,))]
    assert judged(tmp_path, "a_tensor", QUESTIONS[:2]) == [Verdict((0.0, 1.0)), Verdict((2.0,))]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_few", "returned 1 scores for 3 completions"),
        ("nan", "returned the score nan for the completion 'a'"),
        ("text", "returned the score 'good'"),
        ("one_number", "returned float instead of a list of scores"),
        ("raises", "raised KeyError: 'no such prompt'"),
    ],
)
def test_what_it_may_not_do(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(JudgeError, match=said) as caught:
        judged(tmp_path, name, QUESTIONS[:2])
    assert f"{__name__}.{name}" in caught.value.where


def test_what_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        judged(tmp_path, "no_such_module.scores", [])
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        judged(tmp_path, "dpo_ray.no_such_module.scores", [])
    with pytest.raises(ConfigError, match=r"has no function `no_such`\n.*lengths, sometimes") as caught:
        judged(tmp_path, "no_such", [])
    assert "online.judge.function" in caught.value.where
    with pytest.raises(ConfigError, match="has no function"):
        judged(tmp_path, "NOT_CALLABLE", [])
    (tmp_path / "broken_judge.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="fix the module"):
        judged(tmp_path, "broken_judge.scores", [])


def test_the_digest_follows_the_source_and_not_how_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "my_judge_of_digests.py"
    source.write_text("def scores(prompts, completions): return [0.0 for _ in completions]\n")
    config = FunctionJudge(function="my_judge_of_digests.scores")
    before = judge_digest(config)
    assert judge_digest(config.model_copy(update={"replicas": 4, "questions_per_batch": 1})) == before
    assert judge_digest(config.model_copy(update={"function": "my_judge_of_digests.others"})) != before
    source.write_text(source.read_text().replace("0.0", "1.0"))
    assert judge_digest(config) != before
    assert "my_judge_of_digests" not in sys.modules  # read, and not run
    assert judge_digest(FunctionJudge(function="no_such_module.scores"))
