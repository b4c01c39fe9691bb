"""Unpaired examples: a prompt, one completion, and whether it is good.

TRL: docs/source/dataset_formats.md, "Unpaired preference". With the prompt in the completion's messages:
argilla/kto-mix-15k.
"""

from __future__ import annotations

from typing import Any

from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Conversation, TextGroup

from .fields import Fields
from .format import TEMPLATE, Format
from .messages import answer, conversation, last_turn, prompt_of, with_system

_LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}  # CSV only has text


def unpaired(fields: Fields) -> TextGroup:
    """Read a row with one completion; the prompt is a separate field, or the turns before the last one."""
    completion = fields.need("completion", "MISSING_COMPLETION")
    implicit = isinstance(completion, list | tuple) and len(completion) > 1
    if implicit and fields.get("prompt") is None:
        return whole_conversation(conversation(completion, "completion"), fields)
    return labelled(prompt_of(fields), answer(completion, "completion"), fields)


def whole_conversation(turns: Conversation, fields: Fields) -> TextGroup:
    """Build a group from a labelled conversation, whose last turn is the completion."""
    completion = last_turn(turns, "completion")
    if len(turns) == 1:
        raise Rejected("MISSING_PROMPT", "the conversation holds a single message")
    return labelled(with_system(turns[:-1], fields), completion, fields)


def labelled(prompt: str | Conversation, completion: Any, fields: Fields) -> TextGroup:
    """Build a group of one completion, with the row's label as its score: 1 good, 0 bad."""
    if fields.column("label") not in fields.row:
        raise Rejected("BAD_LABEL", "the row has no label")
    score = _LABELS.get(str(fields.get("label")).strip().lower())
    if score is None:
        raise Rejected("BAD_LABEL", f"`{fields.column('label')}` is {fields.get('label')!r}, not true or false"[:200])
    return TextGroup(prompt, (completion,), (score,), chosen=(), rejected=())


FORMATS = (
    Format(
        "unpaired",
        {
            "prompt": ("prompt", "instruction", "question", "input", "messages"),
            "completion": ("completion",),
            "label": ("label", "kto_tag"),
            "system": ("system",),
            **TEMPLATE,
        },
        lambda fields, criteria: unpaired(fields),
    ),
)
