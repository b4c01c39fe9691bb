"""A judge that calls the user's Python function, and checks the scores that the function returns."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from dpo_ray.artifacts.digest import file_sha256
from dpo_ray.config.judge import FunctionJudge
from dpo_ray.errors import ConfigError, JudgeError

from .memory import remembered
from .protocol import Memory, Question, Usage, Verdict

Function = Callable[[list[str], list[str]], Sequence[float | None]]


class JudgeByFunction:
    """A judge that calls a user's function for batches of completions. The scores are stored."""

    def __init__(self, config: FunctionJudge, memory: Memory) -> None:
        """Import the function.

        Raises:
            ConfigError: the function cannot be imported.
        """
        self._config, self._memory = config, memory
        self._function = import_function(config.function)

    @property
    def usage(self) -> Usage:
        return Usage()

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield the index and the verdict of each question (a prompt with its completions), batch by batch.

        Raises:
            JudgeError: the function raised an error, or returned something else than one score per completion.
        """
        return remembered(questions, self._memory, self._config.questions_per_batch, self._ask)

    def close(self) -> None: ...

    def _ask(self, questions: Sequence[Question]) -> list[Verdict]:
        prompts = [q.prompt for q in questions for _ in q.completions]
        completions = [c for q in questions for c in q.completions]
        try:
            answer = self._function(prompts, completions)
        except Exception as error:
            raise self._failed(f"raised {type(error).__name__}: {error}") from error
        scores = iter(self._checked(answer, completions))
        return [_verdict([next(scores) for _ in q.completions]) for q in questions]

    def _checked(self, answer: Any, completions: Sequence[str]) -> list[float | None]:
        try:
            scores = list(answer)
        except TypeError:
            raise self._failed(f"returned {type(answer).__name__} instead of a list of scores") from None
        if len(scores) != len(completions):
            raise self._failed(f"returned {len(scores)} scores for {len(completions)} completions")
        return [self._score(score, completion) for score, completion in zip(scores, completions, strict=True)]

    def _score(self, score: Any, completion: str) -> float | None:
        if score is None:
            return None
        if hasattr(score, "__float__"):  # also NumPy's and torch's scalars
            value = float(score)
            if math.isfinite(value):
                return value
        raise self._failed(f"returned the score {score!r} for the completion {completion[:80]!r}")

    def _failed(self, what: str) -> JudgeError:
        return JudgeError(
            f"the function {what}",
            where=f"online.judge.function={self._config.function}",
            fix="the function gets (prompts, completions) and must return a finite number or None for each completion",
        )


def _verdict(scores: Sequence[float | None]) -> Verdict:
    return Verdict(tuple(scores), reason="the function abstains" if None in scores else "")


def import_function(path: str) -> Function:
    """Import the function with the path `package.module.function`.

    Raises:
        ConfigError: the module cannot be imported, or has no such function.
    """
    module_name, _, name = path.rpartition(".")
    where = f"online.judge.function={path}"
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        fix = "write the path as package.module.function; install the package, or add its directory to PYTHONPATH"
        if not isinstance(error, ModuleNotFoundError) or error.name not in _parents(module_name):
            fix = f"fix the module, so that `python -c 'import {module_name}'` works"
        what = f"the module {module_name} cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(what, where=where, fix=fix) from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name]
        known = ", ".join(own) or "nothing"
        what = f"the module {module_name} has no function `{name}`"
        raise ConfigError(what, where=where, fix=f"name a function of this module, which has these: {known[:300]}")
    return cast(Function, function)


def _parents(module_name: str) -> set[str]:
    parts = module_name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}


def source_digest(path: str) -> str:
    """Return a hash of the source file of a function's module, without running the file.

    Return "" if the module is not found or has no source file.
    """
    try:
        spec = importlib.util.find_spec(path.rpartition(".")[0])
    except (ImportError, ValueError):
        return ""  # `import_function` raises the error with the reason
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return ""
    return file_sha256(Path(spec.origin))
