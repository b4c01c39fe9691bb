"""Reads unpaired examples: a prompt, one completion, and a label that shows whether the completion is good.

TRL: docs/source/dataset_formats.md, "Unpaired preference". In argilla/kto-mix-15k the completion's messages contain the
prompt.
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
    """Read a row with one completion. The prompt has its own column, or is before the last turn of `completion`."""
    completion = fields.need("completion", "MISSING_COMPLETION")
    implicit = isinstance(completion, list | tuple) and len(completion) > 1
    if implicit and fields.get("prompt") is None:
        return whole_conversation(conversation(completion, "completion"), fields)
    return labelled(prompt_of(fields), answer(completion, "completion"), fields)


def whole_conversation(turns: Conversation, fields: Fields) -> TextGroup:
    """Build a group from a row with a label and a conversation, whose last turn is the completion."""
    completion = last_turn(turns, "completion")
    if len(turns) == 1:
        raise Rejected("MISSING_PROMPT", "the conversation is a single message, without a prompt")
    return labelled(with_system(turns[:-1], fields), completion, fields)


def labelled(prompt: str | Conversation, completion: Any, fields: Fields) -> TextGroup:
    """Build a group of one completion. The score is the row's label: 1 for a good completion, 0 for a bad one."""
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
