"""Reads rows with a chosen and a rejected answer: TRL's preference types, which OpenRLHF and most other data sets use, too.

TRL: docs/source/dataset_formats.md, "Preference". OpenRLHF: openrlhf/datasets/reward_dataset.py, with prompt_key,
chosen_key and rejected_key. NeMo-RL's BinaryPreferenceDataset has the format `text`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Conversation, TextGroup

from .fields import Fields
from .format import EXPLICIT, IMPLICIT, TEMPLATE, Format
from .hh import hh_pair
from .messages import (
    answer,
    conversation,
    last_turn,
    only_turn,
    prompt_of,
    system_text,
    user_turn,
    with_system,
)
from .soundness import require, sound_text

PairFormat = Literal["text", "messages", "implicit_messages", "implicit_text", "hh"]


def pair(fields: Fields, row_format: PairFormat) -> TextGroup:
    """Read a row with a chosen and a rejected answer, in one of TRL's formats or in the format of HH-RLHF."""
    chosen, rejected = both(fields)
    match row_format:
        case "text":
            prompt = sound_text(fields.need("prompt", "MISSING_PROMPT"), fields.column("prompt"))
            answers = sound_text(chosen, "chosen"), sound_text(rejected, "rejected")
            return TextGroup(with_system(prompt, fields), answers, (1.0, 0.0))
        case "messages":
            prompt = conversation(fields.need("prompt", "MISSING_PROMPT"), "prompt")
            return preference(prompt, chosen, rejected, fields)
        case "implicit_messages":  # a table has every column in every row: a null prompt counts as missing
            return _implicit_messages(fields.get("prompt"), chosen, rejected, fields)
        case "hh":
            return hh_pair(sound_text(chosen, "chosen"), sound_text(rejected, "rejected"), system_text(fields))
        case _:
            return _implicit_text(sound_text(chosen, "chosen"), sound_text(rejected, "rejected"), fields)


def both(fields: Fields) -> tuple[Any, Any]:
    """Return the row's values for chosen and rejected, unchanged."""
    return fields.need("chosen", "MISSING_CHOSEN"), fields.need("rejected", "MISSING_REJECTED")


def explicit_pair(fields: Fields) -> TextGroup:
    """Read a row with a prompt column and two answers. Prompt and answers may be text or messages."""
    chosen, rejected = both(fields)
    return preference(prompt_of(fields), chosen, rejected, fields)


def preference(prompt: str | Conversation, chosen: Any, rejected: Any, fields: Fields) -> TextGroup:
    """Build a group from a prompt and two answers, which may be text or messages.

    If both answers are conversations that begin with the prompt, the prompt is removed from them.
    """
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return TextGroup(prompt, (sound_text(chosen, "chosen"), sound_text(rejected, "rejected")), (1.0, 0.0))
    if isinstance(prompt, str):
        return _implicit_messages(prompt, chosen, rejected, fields)
    values = {"chosen": chosen, "rejected": rejected}
    turns = {name: conversation(v, name) for name, v in values.items() if isinstance(v, list | tuple)}
    if prompt and turns and all(whole[: len(prompt)] == prompt for whole in turns.values()):  # as in UltraFeedback
        return _implicit_messages(None, chosen, rejected, fields)
    answers = [only_turn(turns[name], name) if name in turns else answer(v, name) for name, v in values.items()]
    return TextGroup(with_system(prompt, fields), tuple(answers), (1.0, 0.0))


def _implicit_messages(prompt: Any, chosen: Any, rejected: Any, fields: Fields) -> TextGroup:
    """Build a group from two conversations that end with the answers.

    The turns before the answers are the prompt, and must be the same in both conversations. If each conversation has
    only one turn, which is the answer, the text `prompt` is the prompt.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise Rejected("WRONG_TYPE", f"`prompt` is {type(prompt).__name__}, neither text nor a list of messages")
    chosen, rejected = ([v] if isinstance(v, Mapping) else v for v in (chosen, rejected))
    turns = conversation(chosen, "chosen"), conversation(rejected, "rejected")
    answers = last_turn(turns[0], "chosen"), last_turn(turns[1], "rejected")
    shared = turns[0][:-1]
    if isinstance(prompt, str) and len(turns[0]) == len(turns[1]) == 1:
        shared = user_turn(sound_text(prompt, "prompt"))
    else:
        if isinstance(prompt, str):
            check_same_prompt(sound_text(prompt, "prompt"), shared)
        require(shared == turns[1][:-1], "PROMPT_MISMATCH", "chosen and rejected differ before their last turn")
        require(bool(shared), "MISSING_PROMPT", "chosen and rejected are single messages, without a prompt")
    return TextGroup(with_system(shared, fields), answers, (1.0, 0.0))


def check_same_prompt(prompt: str, turns: Conversation) -> None:
    """Check that a prompt text fits the conversation: it is empty, equals a user turn, or contains the last user turn."""
    said = [turn["content"].strip() for turn in turns if turn["role"] == "user"]
    same = not prompt.strip() or prompt.strip() in said or (bool(said) and said[-1] in prompt)
    require(same, "PROMPT_MISMATCH", "the prompt's text does not occur in the conversation of chosen and rejected")


def _implicit_text(chosen: str, rejected: str, fields: Fields) -> TextGroup:
    """Build a group from two texts. The prompt is their longest common beginning that does not end inside a word."""
    shared = os.path.commonprefix([chosen, rejected])
    if len(shared) < max(len(chosen), len(rejected)):
        shared = shared[: max(shared.rfind(c) for c in " \n\t") + 1].rstrip()
    require(
        bool(shared.strip()) or chosen == rejected, "PROMPT_MISMATCH", "chosen and rejected have no common beginning"
    )
    answers = chosen[len(shared) :], rejected[len(shared) :]
    prompt = with_system(shared, fields)
    messages = user_turn(shared) if isinstance(prompt, str) else prompt
    return TextGroup(prompt, answers, (1.0, 0.0), messages=messages)


def _pair_as(row_format: PairFormat) -> Format:
    columns = EXPLICIT if row_format in ("text", "messages", "implicit_messages") else IMPLICIT
    return Format(row_format, columns, lambda fields, criteria: pair(fields, row_format))


AXOLOTL = Format(
    "axolotl",
    {
        "prompt": ("messages", "prompt", "question", "instruction", "input"),
        "system": ("system",),
        "chosen": ("chosen", "chosen_response"),
        "rejected": ("rejected", "rejected_response"),
        **TEMPLATE,
    },
    lambda fields, criteria: explicit_pair(fields),
)
FORMATS = (*map(_pair_as, get_args(PairFormat)), AXOLOTL)
