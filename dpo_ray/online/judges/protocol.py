"""The interface of a judge, and its data types: questions, verdicts, costs, and the memory of answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Question:
    """One prompt, and the completions of this prompt that a judge has to score, as texts without special tokens."""

    prompt: str
    completions: tuple[str, ...]
    answer: str | None = None  # for verifiers: the prompt's reference answer, if the data contains one


@dataclass(frozen=True)
class Verdict:
    """A judge's answer to one question: a score for each completion."""

    scores: tuple[float | None, ...]  # of each completion, higher is better; None: the judge abstains (gives no score)
    agreement: float = 1.0  # 0 to 1: how far an ensemble's members agree, or an LLM's answers in both orders of a pair
    reason: str = ""  # why the judge gives no score, if there is a None in `scores`
    members: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)  # the scores of an ensemble's members


@dataclass(frozen=True)
class Usage:
    """The cost of a judge's answers. Reading a stored answer costs nothing."""

    calls: int = 0  # only calls that were answered
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, n) + getattr(other, n) for n in self.__dataclass_fields__))


class Memory(Protocol):
    """The stored answers of a judge, by the digest of the question. `put` returns once the answer is stored safely."""

    def get(self, key: str) -> Any | None: ...

    def put(self, key: str, answer: Any) -> None: ...

    def put_all(self, answers: Mapping[str, Any]) -> None: ...


class Spending:
    """The cost of a round's answers so far, in all processes. Judges add their costs, and compare the sum with `max_usd`.

    If the caller knows what other processes have spent, it must call `set` with the total before each call of
    `Judge.judge`, and with 0 for a new round. Without calls of `set`, only the costs of this process count.
    """

    def __init__(self) -> None:
        self._usd, self._lock = 0.0, threading.Lock()

    @property
    def usd(self) -> float:
        return self._usd

    def set(self, usd: float) -> None:
        with self._lock:
            self._usd = usd

    def add(self, usd: float) -> None:
        with self._lock:
            self._usd += usd


class Judge(Protocol):
    """Scores completions. `dpo_ray.online.judges.make.make_judge` constructs a judge in the process where it works."""

    @property
    def usage(self) -> Usage:
        """Return the cost of all answers so far."""
        ...

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield the index and the verdict of each question (a prompt with its completions), in any order.

        Answers that cost time or money are stored before the verdict is yielded, and are not computed again.

        Raises:
            JudgeError: the judge cannot work. For example, a function raises an error, or an endpoint refuses the API
                key or does not respond.
        """
        ...

    def close(self) -> None:
        """Release the judge's resources."""
        ...
