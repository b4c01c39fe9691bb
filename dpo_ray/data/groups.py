"""The preference group: one prompt and its completions, as text or messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""role and content (text), and where a chat template takes them: name, tool_calls, tool_call_id, ..."""

Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class TextGroup:
    """One prompt and its completions, best first, before rendering.

    `prompt` is text or messages; a completion is the assistant's text, or its message where that holds more than text.
    `messages` is the conversation that a text prompt stands for, for use with a chat template: the turns of HH-RLHF.
    With it, the white space between prompt and completion is the format's and does not go into the conversation.
    Pair p prefers completion `chosen[p]` to `rejected[p]`. A single completion (unpaired) has no pair, and its score is
    its label: 1 good, 0 bad. A ranked list (data.pairing.pairs=list) has none either.

    As it is read, a row with scores or verdicts has its completions in its own order and no pairs yet; `pairing` makes
    them. Then a row with verdicts has no scores: 0 is a tie, otherwise a verdict is the number of the better completion.
    """

    prompt: str | Conversation
    completions: tuple[str | Message, ...]
    scores: tuple[float, ...]
    chosen: tuple[int, ...] = (0,)
    rejected: tuple[int, ...] = (1,)
    preference_probability: float = 1.0
    messages: Conversation | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    verdicts: tuple[int, ...] = ()
