"""Reads rows with two completions and the verdicts of several annotators.

PandaLM: github.com/WeOpenML/PandaLM, data/testset-v1.json. A verdict of 1 or 2 is the number of the better response, and
0 is a tie.
"""

from __future__ import annotations

from typing import Any

from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Message, TextGroup

from .fields import Fields
from .format import TEMPLATE, Format
from .messages import answer, prompt_of
from .soundness import require, sound_text


def verdicts(fields: Fields) -> TextGroup:
    """Read two completions and the annotators' verdicts. An annotator whose value is null gave no verdict."""
    completions = two_completions(fields)
    values = fields.several("annotators", "BAD_LABEL") or []
    votes = tuple(_verdict(value) for value in values if value is not None)
    require(bool(votes), "BAD_LABEL", "no annotator gave a verdict")
    return TextGroup(_prompt(fields), completions, (), chosen=(), rejected=(), verdicts=votes)


def two_completions(fields: Fields) -> tuple[str | Message, ...]:
    """Read the two completions that were compared, from two columns or from one column with a list."""
    items = fields.several("completions", "MISSING_COMPLETION") or fields.need("completions", "MISSING_COMPLETION")
    require(isinstance(items, list | tuple), "WRONG_TYPE", "the completions are not a list")
    if len(items) > 2:
        items = [item for item in items if item is not None]  # columns of other layouts in the same table are null
    require(
        len(items) > 1, "MISSING_COMPLETION", f"the number of completions is {len(items)}, but a verdict compares two"
    )
    require(len(items) == 2, "WRONG_TYPE", f"there are {len(items)} completions, but a verdict compares two")
    require(None not in items, "NULL_FIELD", "a completion is null")
    return tuple(answer(item, "completion") for item in items)


def _prompt(fields: Fields):
    """Read the prompt. The instruction and its input, if there is any, are joined with a blank line."""
    prompt, more = prompt_of(fields), fields.get("input")
    if more is None or not sound_text(more, fields.column("input")).strip():
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n\n{more}" if prompt.strip() else more
    if not prompt:
        return more
    require(
        prompt[-1]["role"] == "user",
        "PROMPT_MISMATCH",
        "the row has an input, but the last turn is not the user's",
    )
    *before, last = prompt
    return (*before, {**last, "content": f"{last['content']}\n\n{more}"})


def _verdict(value: Any) -> int:
    text = str(value).strip().removesuffix(".0")  # CSV only has text, and a column with nulls may contain floats
    if isinstance(value, bool) or text not in ("0", "1", "2"):
        raise Rejected("BAD_LABEL", f"a verdict is {value!r}, not 0 (a tie), 1 or 2"[:200])
    return int(text)


FORMATS = (
    Format(
        "verdicts",
        {
            "prompt": ("instruction", "prompt", "question"),
            "input": ("input",),
            "completions": ("response#",),
            "annotators": ("annotator#",),
            "system": ("system",),
            **TEMPLATE,
        },
        lambda fields, criteria: verdicts(fields),
    ),
)
