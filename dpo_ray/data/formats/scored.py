"""Reads rows with a list of completions and their scores or ranks.

UltraFeedback: github.com/OpenBMB/UltraFeedback, README.md, "Dataset Format". Nectar: the card of
huggingface.co/datasets/berkeley-nest/Nectar. NeMo-RL: docs/guides/dpo.md, "Datasets" (the lowest rank is preferred).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Message, TextGroup

from .fields import Fields
from .format import TEMPLATE, Format
from .hh import is_transcript, turns_of, with_system_text
from .messages import KEPT, answer, prompt_of, system_text
from .soundness import require, sound_text

TEXTS = ("response", "answer", "completion", "text")
SCORES = ("overall_score", "fine-grained_score", "score", "rating")
RANKS = ("rank",)
RATINGS = ("annotations", "ratings", "scores")
"""TEXTS, SCORES, RANKS, RATINGS: the possible names of the fields of a completion that hold its text, its score, its
rank, and its ratings by several criteria."""

LARGEST = 3.4e38  # the largest float32; scores are stored as float32


def scored(fields: Fields, criteria: Mapping[str, float]) -> TextGroup:
    """Read a prompt, and its completions in the row's order with their scores. Ranks are converted to scores.

    Args:
        criteria: the weights of the ratings whose weighted mean is the score. Empty: the scores of the row are used.
    """
    items = fields.several("completions", "MISSING_COMPLETION") or fields.need("completions", "MISSING_COMPLETION")
    require(isinstance(items, list | tuple), "WRONG_TYPE", "the completions are not a list")
    require(
        len(items) > 1, "MISSING_COMPLETION", f"the number of completions is {len(items)}, but a preference needs two"
    )
    completions = tuple(_completion(item, i) for i, item in enumerate(items))
    scores = tuple(_weighted(item, i, criteria) for i, item in enumerate(items)) if criteria else _scores(fields, items)
    # Models often give the same short answer: only the first of equal ones counts, since they express no preference.
    first = [i for i, completion in enumerate(completions) if completion not in completions[:i]]
    require(len(first) > 1, "IDENTICAL_PAIR", f"all {len(completions)} completions are the same")
    return _with_prompt(fields, tuple(completions[i] for i in first), tuple(scores[i] for i in first))


def _with_prompt(fields: Fields, completions: tuple[str | Message, ...], scores: tuple[float, ...]) -> TextGroup:
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not is_transcript(prompt) or not all(isinstance(c, str) for c in completions):
        return TextGroup(prompt_of(fields), completions, scores, chosen=(), rejected=())
    # As in HH-RLHF, white space before an answer belongs to the answer: it forms one token with the first word.
    text = sound_text(prompt, fields.column("prompt")).rstrip()
    spaced = tuple(prompt[len(text) :] + str(c) for c in completions)
    text = with_system_text(text, system_text(fields))
    return TextGroup(text, spaced, scores, chosen=(), rejected=(), messages=turns_of(text))


def _completion(item: Any, i: int) -> str | Message:
    where = f"completion {i}"
    if isinstance(item, Mapping) and "role" not in item and "from" not in item:
        name = next((t for t in TEXTS if t in item), None)
        if name is None:
            raise Rejected("MISSING_COMPLETION", f"{where} has none of {', '.join(TEXTS)}")
        beside = {key: item[key] for key in (*KEPT, "tool_calls", "function_call") if item.get(key) and key != "name"}
        item = item[name]
        if beside:  # an answer's reasoning or calls
            require(
                isinstance(item, str),
                "BAD_MESSAGE",
                f"{where} is a message, but there is also {', '.join(beside)} beside it",
            )
            item = {"role": "assistant", "content": item, **beside}
    require(item is not None, "NULL_FIELD", f"{where} is null")
    return answer(item, "completion")


def _scores(fields: Fields, items: Sequence[Any]) -> tuple[float, ...]:
    """Return the scores of the completions. They are read from the first of these that the row has:

    1. one column of scores per completion, if the recipe names such columns
    2. a column with a list of scores or ranks
    3. a field inside every completion, with the name that the recipe sets, or else with a usual name
    """
    if (beside := fields.several("scores", "BAD_SCORE")) is not None:
        return _beside(beside, items)
    for role, signed in (("scores", 1), ("ranks", -1)):
        if (beside := fields.get(role)) is not None:
            return _best_highest(_beside(beside, items), signed)
    own = ((fields.columns.scores,), 1), ((fields.columns.ranks,), -1), (SCORES, 1), (RANKS, -1)
    for names, signed in own:
        for name in (n for n in names if isinstance(n, str)):
            values = [_number(item.get(name)) if isinstance(item, Mapping) else None for item in items]
            if None not in values:
                return _best_highest(tuple(v for v in values if v is not None), signed)
    raise Rejected(
        "BAD_SCORE",
        f"the {len(items)} completions have no field (score or rank) in which each of them has a finite number",
    )


def _beside(values: Any, items: Sequence[Any]) -> tuple[float, ...]:
    require(isinstance(values, list | tuple), "WRONG_TYPE", "the scores are not a list")
    short = len(items) < len(values)
    require(not short, "MISSING_COMPLETION", f"{len(items)} completions have {len(values)} scores")
    require(len(items) == len(values), "BAD_SCORE", f"{len(items)} completions have {len(values)} scores")
    return tuple(_need_number(value, f"score {i}") for i, value in enumerate(values))


def _best_highest(values: tuple[float, ...], signed: int) -> tuple[float, ...]:
    """Convert values to scores, where a higher score is better.

    If `signed` is -1, the values are ranks, where a lower rank is better. Their scores are the distances to the last rank.
    """
    return values if signed == 1 else tuple(max(values) - v for v in values)


def _weighted(item: Any, i: int, criteria: Mapping[str, float]) -> float:
    """Compute the weighted mean of a completion's ratings; a rating that is not a number ("N/A") is ignored."""
    require(isinstance(item, Mapping), "BAD_SCORE", f"completion {i} has no ratings")
    ratings = next((item[name] for name in RATINGS if isinstance(item.get(name), Mapping)), item)
    absent = sorted(criteria.keys() - ratings.keys())
    require(not absent, "BAD_SCORE", f"completion {i} has no `{', '.join(absent)}`")
    values = {name: _number(_rating(ratings[name])) for name in criteria}
    known = {name: value for name, value in values.items() if value is not None}
    require(bool(known), "BAD_SCORE", f"completion {i}: none of {', '.join(criteria)} is a number")
    return sum(criteria[n] * v for n, v in known.items()) / sum(criteria[n] for n in known)


def _rating(value: Any) -> Any:
    return value.get("Rating", value.get("rating")) if isinstance(value, Mapping) else value


def _need_number(value: Any, where: str) -> float:
    number = _number(value)
    if number is None:
        raise Rejected("BAD_SCORE", f"{where} is {value!r}"[:200])
    return number


def _number(value: Any) -> float | None:
    """Convert a number, or a text that contains one, to a float. Return None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and abs(number) < LARGEST else None


NEMO = {
    "prompt": ("context",),
    "completions": ("completions",),
    "scores": (),
    "ranks": (),
    "system": ("system",),
    **TEMPLATE,
}
FORMATS = (
    Format(
        "scored",
        {
            "prompt": ("prompt", "instruction", "question", "messages", "context"),
            "completions": ("completions", "answers", "responses", "generations"),
            "scores": ("scores", "ratings"),
            "ranks": ("ranks",),
            "system": ("system",),
            **TEMPLATE,
        },
        scored,
    ),
    Format("nemo", NEMO, scored),
)
