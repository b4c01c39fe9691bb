"""Reads the layouts of LLaMA-Factory and Axolotl that differ from TRL's layouts.

LLaMA-Factory: data/README.md, "Alpaca Format" and "Sharegpt Format". Axolotl: docs/rlhf.qmd, "DPO".
"""

from __future__ import annotations

from typing import Any

from dpo_ray.data.groups import Conversation, TextGroup

from .fields import Fields
from .format import PAIR, TEMPLATE, Format
from .messages import answer, conversation, user_turn, with_system
from .pairs import both, preference
from .soundness import require, sound_text
from .unpaired import labelled, whole_conversation


def alpaca(fields: Fields) -> TextGroup:
    """Read a row of the Alpaca layout: a prompt, and either two answers or one answer with a label."""
    prompt = _alpaca_prompt(fields)
    if _is_labelled(fields):
        return labelled(prompt, answer(fields.need("completion", "MISSING_COMPLETION"), "completion"), fields)
    return preference(prompt, *both(fields), fields)


def _alpaca_prompt(fields: Fields) -> str | Conversation:
    """Build the prompt from the columns instruction, input, history and system.

    Instruction and input are joined with a line end, as LLaMA-Factory does (src/llamafactory/data/converter.py).
    """
    instruction = sound_text(fields.need("prompt", "MISSING_PROMPT"), fields.column("prompt"))
    more = fields.get("input")
    parts = (instruction, "" if more is None else sound_text(more, fields.column("input")))
    text = "\n".join(part for part in parts if part)
    before = history(fields.get("history"))
    return with_system((*before, *user_turn(text)) if before else text, fields)


def history(value: Any) -> Conversation:
    """Read the earlier turns of a conversation from a list of [user text, assistant text]."""
    require(value is None or isinstance(value, list | tuple), "WRONG_TYPE", "`history` is not a list")
    turns = []
    for exchange in value or ():
        pairs = isinstance(exchange, list | tuple) and len(exchange) == 2
        require(pairs, "WRONG_TYPE", "`history` is not a list of [user, assistant]")
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            turns.append({"role": role, "content": sound_text(text, "history")})
    return tuple(turns)


def sharegpt(fields: Fields) -> TextGroup:
    """Read a row of the ShareGPT layout.

    The row has either a conversation and two answers to it, or a label and a conversation whose last turn is the answer.
    """
    turns = conversation(fields.need("prompt", "MISSING_PROMPT"), fields.column("prompt"))
    if _is_labelled(fields):
        return whole_conversation(turns, fields)
    return preference(with_system(turns, fields), *both(fields), fields)


def _is_labelled(fields: Fields) -> bool:
    return fields.get("label") is not None and fields.get("chosen") is None and fields.get("rejected") is None


FORMATS = (
    Format(
        "alpaca",
        {
            "prompt": ("instruction", "prompt"),
            "input": ("input", "query"),
            "history": ("history",),
            "system": ("system",),
            "completion": ("output", "response"),
            "label": ("kto_tag", "label"),
            **PAIR,
            **TEMPLATE,
        },
        lambda fields, criteria: alpaca(fields),
    ),
    Format(
        "sharegpt",
        {
            "prompt": ("conversations", "messages"),
            "system": ("system",),
            "label": ("kto_tag", "label"),
            **PAIR,
            **TEMPLATE,
        },
        lambda fields, criteria: sharegpt(fields),
    ),
)
