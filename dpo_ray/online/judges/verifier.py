"""A judge that checks completions against the prompt's reference answer: a text, a number, a pattern, or unit tests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import regex

from dpo_ray.config.judge import VerifierJudge
from dpo_ray.errors import ConfigError

from .memory import remembered
from .protocol import Memory, Question, Usage, Verdict
from .unit_test.run import can_confine, passes

# A sign directly after a word or a number is a minus operator or a hyphen, not part of a number. Commas may separate
# thousands. In `1.5.2`, nothing after the first dot is taken as the start of a number.
NUMBER = re.compile(
    r"(?<!\w)(?<!\d\.)[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII
)


class JudgeByVerifier:
    """A judge that scores a completion 1 if it passes the check, else 0.

    Only the verdicts of unit tests are stored, because all other checks are fast.
    """

    def __init__(self, config: VerifierJudge, memory: Memory) -> None:
        """Compile the pattern `extract`, and check that unit tests can run safely here.

        Raises:
            ConfigError: `extract` is not a regular expression with one group; or unit tests are wanted, but this machine
                cannot confine their process.
        """
        if config.check == "unit_test" and not config.allow_unconfined and not can_confine():
            raise ConfigError(
                "this machine does not let a user's process enter new namespaces, so code of the model could reach "
                "the network and other processes",
                where="online.judge.check=unit_test",
                fix="run where unprivileged user namespaces are allowed, or set online.judge.allow_unconfined=true on a "
                "machine whose loss does not matter",
            )
        self._config, self._memory = config, memory
        self._extract = None if config.extract is None else _extracting(config.extract)

    @property
    def usage(self) -> Usage:
        return Usage()

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        if self._config.check == "unit_test":
            return remembered(questions, self._memory, 1, lambda batch: [self._verdict(q) for q in batch])
        return ((number, self._verdict(question)) for number, question in enumerate(questions))

    def close(self) -> None: ...

    def _verdict(self, question: Question) -> Verdict:
        if question.answer is None:
            return Verdict((None,) * len(question.completions), reason="no reference answer")
        scores, reasons = [], []
        for completion in question.completions:
            try:
                scores.append(float(self._holds(completion, question.answer)))
            except _Unknown as unknown:
                scores.append(None)
                reasons.append(str(unknown))
        return Verdict(tuple(scores), reason="; ".join(dict.fromkeys(reasons)))

    def _holds(self, completion: str, answer: str) -> bool:
        text = completion if self._extract is None else self._extracted(completion)
        if text is None:
            return False
        match self._config.check:
            case "exact":
                return _plain(text) == _plain(answer)
            case "numeric":
                return _same_number(text, answer, self._config.tolerance)
            case "regex":
                return self._matches(answer, text)
            case "unit_test":
                limits = self._config.timeout_seconds, self._config.memory_mib
                return passes(text, answer, *limits, confined=not self._config.allow_unconfined)

    def _extracted(self, completion: str) -> str | None:
        """Return the text that the group of `extract` captured in its last match.

        Return None if nothing matches, because the completion then does not have the requested form.
        """
        assert self._extract is not None  # noqa: S101 - the caller has checked
        answer = None
        try:
            for match in self._extract.finditer(completion, timeout=self._config.timeout_seconds):
                answer = match[1]
        except TimeoutError:
            raise _Unknown(f"`extract` took over {self._config.timeout_seconds:g} s on a completion") from None
        return answer

    def _matches(self, pattern: str, text: str) -> bool:
        try:
            return regex.search(pattern, text, timeout=self._config.timeout_seconds) is not None
        except regex.error as error:
            raise _Unknown(f"the reference answer is not a regular expression: {error}") from None
        except TimeoutError:
            raise _Unknown(f"the pattern took over {self._config.timeout_seconds:g} s on a completion") from None


class _Unknown(Exception):
    """Raised if it cannot be determined whether a completion passes."""


def _extracting(pattern: str) -> regex.Pattern[str]:
    where = "online.judge.extract"
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(
            f"the pattern is not a regular expression: {error}", where=where, fix="correct the pattern"
        ) from None
    if compiled.groups != 1:
        fix = "put only the answer's part in a capturing group (...), and use (?:...) for all other groups"
        raise ConfigError(f"the pattern has {compiled.groups} groups, not 1", where=where, fix=fix)
    return compiled


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _same_number(text: str, answer: str, tolerance: float) -> bool:
    expected, actual = _last_number(answer), _last_number(text)
    if expected is None:
        raise _Unknown("the reference answer contains no number")
    return actual is not None and abs(actual - expected) <= tolerance


def _last_number(text: str) -> float | None:
    """Return the last number in a text, such as `1,234.5`, `-3`, `2e-4` or `.5`; None if there is none.

    In a fraction such as 3/4 this is the denominator.
    """
    numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return float(numbers[-1].replace(",", "")) if numbers else None
