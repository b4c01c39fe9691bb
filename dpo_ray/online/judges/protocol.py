"""The protocol of judges: questions, verdicts, costs, the memory of answers, and the interface of a judge."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Question:
    """One prompt and the completions to judge, as text without special tokens."""

    prompt: str
    completions: tuple[str, ...]
    answer: str | None = None  # for verifiers: the prompt's reference answer, if its row has one


@dataclass(frozen=True)
class Verdict:
    """A judge's answer to a question."""

    scores: tuple[float | None, ...]  # of each completion, higher is better; None: the judge abstains on it
    agreement: float = 1.0  # 0 to 1: of an ensemble's members, or of both orders of a pairwise judge
    reason: str = ""  # why the judge abstains, if it does
    members: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)  # the scores of an ensemble's members


@dataclass(frozen=True)
class Usage:
    """The cost of answers. Stored answers cost nothing."""

    calls: int = 0  # only those that were answered
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, n) + getattr(other, n) for n in self.__dataclass_fields__))


class Memory(Protocol):
    """The stored answers of a judge, by the digest of the question. `put` returns when the answer is safe on disk."""

    def get(self, key: str) -> Any | None: ...

    def put(self, key: str, answer: Any) -> None: ...

    def put_all(self, answers: Mapping[str, Any]) -> None: ...


class Spending:
    """The cost of a round's answers so far, in all processes: judges add to it, and compare it with `max_usd`.

    A caller that knows what other processes have spent reports it with `set` before a call of `judge`, and sets 0 for a
    new round. Without that, it counts everything that this process has spent.
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
    """A judge in the process where it works. Constructed by `dpo_ray.online.judges.make.make_judge`."""

    @property
    def usage(self) -> Usage:
        """Return the cost of all answers so far."""
        ...

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield the number of a question and its verdict as each is reached, in any order.

        An answer that costs something is stored before its verdict is yielded; a question (or, for an LLM, each single
        call) that the memory knows is not asked again.

        Raises:
            JudgeError: the judge cannot work: a function raises, or an endpoint refuses the key or does not respond.
        """
        ...

    def close(self) -> None:
        """Release the judge's resources."""
        ...
