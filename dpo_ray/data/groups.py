"""The preference group: one prompt and its completions. It has three forms: as text, as token ids, and for training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the maths, which uses `Group`, also runs without pyarrow
    import pyarrow as pa

Message = dict[str, Any]
"""A message has the keys `role` and `content` (text), and optional keys that a chat template reads: name, tool_calls, ..."""

Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class TextGroup:
    """One prompt and its completions, best first, before rendering.

    `prompt` is text or messages. A completion is the assistant's text, or the assistant's message if the message
    contains more than text.
    If the text of `prompt` is a transcript of a conversation (as in HH-RLHF), `messages` holds its turns, for use with a
    chat template. The white space between prompt and completion then belongs to the format, not to the conversation.

    Pair p prefers completion `chosen[p]` to `rejected[p]`. A single completion (unpaired) has no pair, and its score is
    its label: 1 good, 0 bad. A ranked list (data.pairing.pairs=list) has no pairs either.

    Directly after reading, a row with scores or verdicts has no pairs yet, and its completions are in the row's order;
    `pairing` sorts them and builds the pairs. A row with verdicts also has no scores until then. A verdict is the number
    of the better completion (1 or 2), or 0 for a tie.
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


@dataclass(frozen=True, eq=False)
class TokenGroup:
    """A preference group as token ids, with hashes for finding duplicates, opposite preferences and leaked prompts."""

    prompt_ids: np.ndarray  # int32 [prompt tokens]
    completion_ids: list[np.ndarray]  # int32 [tokens] each; best first
    scores: list[float]
    chosen: list[int]
    rejected: list[int]
    preference_probability: float
    prompt_hash: bytes  # hash of the prompt before truncation
    weight: float = 1.0

    @property
    def group_id(self) -> bytes:
        """Return a hash (16 bytes) of the prompt and the completions in their order of preference.

        The hash does not depend on the scores, with one exception: for a single completion, it depends on the label.
        """
        return _group_id(self.prompt_ids, self.completion_ids, self.scores)

    @property
    def opposite_id(self) -> bytes | None:
        """Return the group_id of the opposite preference; None if there are more than two completions.

        The opposite of a pair has its completions exchanged. The opposite of a single completion has the other label.
        """
        if len(self.completion_ids) > 2:
            return None
        return _group_id(self.prompt_ids, self.completion_ids[::-1], [1.0 - s for s in self.scores])


def _group_id(prompt_ids: np.ndarray, completion_ids: Sequence[np.ndarray], scores: Sequence[float]) -> bytes:
    content = [
        part for ids in (prompt_ids, *completion_ids) for part in (len(ids).to_bytes(4, "little"), ids.tobytes())
    ]
    if len(completion_ids) == 1:  # a single completion has a label instead of an order
        content.append(np.float32(scores[0]).tobytes())
    return hashlib.blake2b(b"".join(content), digest_size=16).digest()  # unambiguous: the length stands before the ids


def _no_pairs() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclass(frozen=True)
class Group:
    """One prompt with K completions, the preferences between them, and the reference model's log-prob of every token.

    Pair p prefers completion `chosen[p]` to `rejected[p]`. There are no pairs if the group is a single completion or a
    ranked list, or if it is only scored and not trained on.
    """

    group_id: bytes
    prompt_ids: np.ndarray  # int32 [prompt tokens]
    completion_ids: tuple[np.ndarray, ...]  # K x int32 [completion tokens]
    scores: np.ndarray  # float32 [K]; NaN = a completion of another prompt
    chosen: np.ndarray = field(default_factory=_no_pairs)  # int [pairs], from 0 to K - 1
    rejected: np.ndarray = field(default_factory=_no_pairs)
    preference_probability: float = 1.0
    weight: float = 1.0
    reference_token_logps: tuple[np.ndarray, ...] | None = None  # K x float32 [completion tokens]
    source: str = ""

    @property
    def tokens(self) -> int:
        """Count the tokens of the prompt (once) and of all completions."""
        return len(self.prompt_ids) + sum(len(c) for c in self.completion_ids)


def groups_of(table: pa.Table) -> Iterator[Group]:
    """Yield the groups of a table with the schema TOKENS. A column `token_logps` may hold reference log-probs."""
    for row in table.to_pylist():
        known = row.get("token_logps")
        yield Group(
            group_id=row["group_id"],
            prompt_ids=np.array(row["prompt_ids"], np.int32),
            completion_ids=tuple(np.array(c, np.int32) for c in row["completion_ids"]),
            scores=np.array(row["scores"], np.float32),
            chosen=np.array(row["chosen"], np.int32),
            rejected=np.array(row["rejected"], np.int32),
            preference_probability=row["preference_probability"],
            weight=row["weight"],
            source=row["source"],
            reference_token_logps=None if known is None else tuple(np.array(k, np.float32) for k in known),
        )
