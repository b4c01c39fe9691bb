"""What a judge is asked, what it says, and what it is."""

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
    answer: str | None = None  # the prompt's reference answer, where its row has one: for verifiers


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a question."""

    scores: tuple[float | None, ...]  # of each completion, higher is better; None: the judge abstains on it
    agreement: float = 1.0  # 0 to 1: of an ensemble's members, or of both orders of a pairwise judge
    reason: str = ""  # why it abstains, where it does
    members: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)  # of an ensemble: each one's scores


@dataclass(frozen=True)
class Usage:
    """What answers have cost. Those that were remembered cost nothing."""

    calls: int = 0  # that were answered
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, n) + getattr(other, n) for n in self.__dataclass_fields__))


class Memory(Protocol):
    """Answers that a judge has given, by the digest of what was asked. `put` returns when the answer is safe on disk."""

    def get(self, key: str) -> Any | None: ...

    def put(self, key: str, answer: Any) -> None: ...

    def put_all(self, answers: Mapping[str, Any]) -> None: ...


class Spending:
    """What a round's answers have cost so far, in all processes: judges add to it, and hold it against `max_usd`.

    Whoever knows what other processes have spent says so with `set` before a call of `judge`, and sets 0 for a new round. Without
    that it counts all that this process has spent.
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
    """A judge in the process where it works. Made by `dpo_ray.online.judges.make.make_judge`."""

    @property
    def usage(self) -> Usage:
        """What all answers so far have cost."""
        ...

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield the number of a question and its verdict as each is reached, in any order.

        What one question costs is remembered before its verdict is yielded; a question (or, of an LLM, each single call)
        that the memory knows is not asked again.

        Raises:
            JudgeError: the judge cannot work: a function that raises, an endpoint that refuses the key or stays away.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...
