"""Reads ms-swift's layouts: the chosen answer is the last turn of a conversation, the rejected answer has its own column.

ms-swift: docs/source_en/Customization/Custom-dataset.md, "DPO/ORPO/CPO/SimPO/RM".
"""

from __future__ import annotations

from typing import Any

from dpo_ray.data.groups import Conversation, Message, TextGroup

from .fields import Fields
from .format import TEMPLATE, Format
from .llama_factory import history
from .messages import answer, conversation, last_turn, user_turn, with_system
from .soundness import require, sound_text

MESSAGES, QUERY = "messages", "query"


def swift(fields: Fields) -> TextGroup:
    """Read the prompt and both answers. Prompt and chosen answer are in `messages`, or in `query` and `response`."""
    if fields.row.get(MESSAGES) is not None or fields.columns.prompt:
        turns = conversation(fields.need("prompt", "MISSING_PROMPT"), fields.column("prompt"))
        prompt, chosen = turns[:-1], last_turn(turns, "chosen")
        require(bool(prompt), "MISSING_PROMPT", "the conversation is a single message, without a prompt")
        _check_same(fields, prompt, chosen)
    else:
        query = sound_text(fields.need("query", "MISSING_PROMPT"), fields.column("query"))
        prompt = (*history(fields.get("history")), *user_turn(query))
        chosen = answer(fields.need("chosen", "MISSING_CHOSEN"), "chosen")
    prompt = with_system(prompt, fields)
    rejected = _rejected(fields.need("rejected", "MISSING_REJECTED"), prompt, fields)
    return TextGroup(prompt, (chosen, rejected), (1.0, 0.0))


def _check_same(fields: Fields, prompt: Conversation, chosen: str | Message) -> None:
    """Check that the columns for query and response agree with the conversation of the row, and that there is no `history`."""
    query, response = fields.get("query"), fields.get("chosen")
    same = not query or any(turn["content"].strip() == str(query).strip() for turn in prompt)
    require(same, "PROMPT_MISMATCH", f"`{fields.column('query')}` is no turn of the conversation")
    require(not history(fields.get("history")), "PROMPT_MISMATCH", "the row has both a conversation and a `history`")
    same = not response or answer(response, "chosen") == chosen
    require(same, "PROMPT_MISMATCH", f"`{fields.column('chosen')}` is not the last turn of the conversation")


def _rejected(value: Any, prompt: str | Conversation, fields: Fields) -> Any:
    """Read the rejected answer. It may also be the last turn of a conversation that begins with the prompt."""
    if not isinstance(value, list | tuple) or len(value) < 2:
        return answer(value, "rejected")
    turns = conversation(value, "rejected")
    require(
        with_system(turns[:-1], fields) == prompt,
        "PROMPT_MISMATCH",
        "chosen and rejected differ before their last turn",
    )
    return last_turn(turns, "rejected")


FORMATS = (
    Format(
        "swift",
        {
            "prompt": (MESSAGES,),
            "query": (QUERY,),
            "history": ("history",),
            "system": ("system",),
            "chosen": ("response",),
            "rejected": ("rejected_response", "rejected_messages"),
            **TEMPLATE,
        },
        lambda fields, criteria: swift(fields),
    ),
)
