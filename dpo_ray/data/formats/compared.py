"""Reads rows with two completions and a column that shows which completion is better.

PKU-SafeRLHF: the card of huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF. HelpSteer2-Preference and HelpSteer3: the
cards of huggingface.co/datasets/nvidia/HelpSteer2 and HelpSteer3. Chatbot Arena: the card of
huggingface.co/datasets/lmsys/chatbot_arena_conversations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dpo_ray.data.admission import Rejected
from dpo_ray.data.groups import Conversation, Message, TextGroup

from .fields import Fields
from .format import TEMPLATE, Format
from .messages import conversation, last_turn, prompt_of, with_system
from .pairs import check_same_prompt
from .pandalm import two_completions
from .soundness import require, sound_text

SIDES = ("conversation_a", "conversation_b")
"""The two columns that hold conversations: each one with another model. The last turns of the two are compared."""

_WORDS = {
    **dict.fromkeys(("model_a", "a", "left", "first"), 1),
    **dict.fromkeys(("model_b", "b", "right", "second"), 2),
    **dict.fromkeys(("tie", "tie (bothbad)", "both_bad", "both", "bothbad", "equal"), 0),
}
_TIE, _FIRST, _SECOND = 0, 1, 2
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")


def compared(fields: Fields) -> TextGroup:
    """Read two completions, and which of them is better. This choice counts as the verdict of a single annotator."""
    is_battle = fields.row.get(SIDES[0]) is not None
    prompt, completions = _battle(fields) if is_battle else (prompt_of(fields), two_completions(fields))
    return TextGroup(prompt, completions, (), chosen=(), rejected=(), verdicts=(_agreed_verdict(fields),))


def _agreed_verdict(fields: Fields) -> int:
    """Return the verdict of the first column that has a verdict.

    The row is rejected if another column contradicts this verdict, except the column SAFER (verdict on safety).

    Raises:
        Rejected: BAD_LABEL or NULL_FIELD.
    """
    first = fields.column("preference")
    words = _words(fields)
    verdict = _verdict(fields.need("preference", "BAD_LABEL"), first, words)
    for name in fields.names["preference"]:
        if name in (first, SAFER) or fields.row.get(name) is None:
            continue
        try:
            other = _verdict(fields.row[name], name, words)
        except Rejected:  # such as the name of a model, which tells nothing of the sides
            continue
        require(other == verdict, "BAD_LABEL", f"`{first}` and `{name}` contradict each other")
    return verdict


def _battle(fields: Fields) -> tuple[str | Conversation, tuple[str | Message, ...]]:
    sides = [conversation(fields.row.get(side), side) for side in SIDES]
    answers = tuple(last_turn(turns, side) for turns, side in zip(sides, ("chosen", "rejected"), strict=True))
    require(sides[0][:-1] == sides[1][:-1], "PROMPT_MISMATCH", "the conversations differ before their last turn")
    require(len(sides[0]) > 1, "MISSING_PROMPT", "each conversation is a single message, without a prompt")
    beside = [name for name in fields.spread("completions") if fields.row.get(name)]
    require(not beside, "UNKNOWN_FORMAT", f"the row has conversations and also {', '.join(beside)}"[:200])
    if (prompt := fields.get("prompt")) is not None:
        check_same_prompt(sound_text(prompt, fields.column("prompt")), sides[0][:-1])
    return with_system(sides[0][:-1], fields), answers


def _words(fields: Fields) -> dict[str, int]:
    """Return the verdict that each known word stands for: 1 first, 2 second, 0 a tie.

    Besides the usual words, these are the names of the completions' columns, and the numbers at the end of these names.
    """
    columns = [name for name in fields.spread("completions") if fields.row.get(name) is not None]
    numbers = [match[0] for name in columns if (match := re.search(r"[0-9]+$", name))]
    numbers = numbers if len(numbers) == len(columns) == 2 else ["1", "2"]
    sides = [*zip(columns, (_FIRST, _SECOND), strict=False), *zip(numbers, (_FIRST, _SECOND), strict=True)]
    return _WORDS | {name.lower(): side for name, side in sides}


def _verdict(value: Any, name: str, words: Mapping[str, int]) -> int:
    """Return 1 if the first completion is better, 2 if the second is better, and 0 for a tie.

    The column `name` decides how the value is read. In a column that ends with `_id`, 0 is the first completion and 1
    the second. In a column of STRENGTHS (HelpSteer), a negative number means that the first is better. In any other
    column the value is a word such as `model_a` or `tie`.
    """
    text = str(value).strip().lower().removesuffix(".0")  # CSV only has text, and a column with nulls may hold floats
    if name.endswith("_id") and text in ("0", "1") and not isinstance(value, bool):
        return _SECOND if text == "1" else _FIRST
    if name in STRENGTHS and _INTEGER.fullmatch(text):
        strength = int(text)
        return _TIE if strength == 0 else _FIRST if strength < 0 else _SECOND
    if isinstance(value, str) and name not in STRENGTHS and text in words:
        return words[text]
    raise Rejected("BAD_LABEL", f"`{name}` is {value!r}, which does not show the better completion"[:200])


STRENGTHS = ("preference_strength", "overall_preference")
SAFER = "safer_response_id"
"""The column with the verdict on safety. This verdict may differ from the verdict on overall quality
in another column."""

FORMATS = (
    Format(
        "compared",
        {
            "prompt": ("prompt", "context", "instruction", "question"),
            "completions": ("response#",),
            "sides": SIDES,
            "preference": ("better_response_id", SAFER, *STRENGTHS, "winner"),
            "system": ("system",),
            **TEMPLATE,
        },
        lambda fields, criteria: compared(fields),
    ),
)
