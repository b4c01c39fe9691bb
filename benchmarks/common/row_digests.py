"""One digest for each row's token ids, by which the results of two programs are compared without moving them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain


def row_digest(
    prompt_ids: Sequence[int], completion_ids: Sequence[Sequence[int]], max_length_tokens: int, turn_end_id: int | None
) -> str:
    """Digest prompt + completion of every completion, as training would see them.

    Args:
        max_length_tokens: prompt + completion is cut at its end to this: TRL leaves that to its collator.
        turn_end_id: what a template writes after this token, the completion's last, does not count; None: everything does.
    """
    h = hashlib.blake2b(digest_size=10)
    for completion in completion_ids:
        if turn_end_id is not None and turn_end_id in completion:
            completion = completion[: len(completion) - list(reversed(completion)).index(turn_end_id)]
        whole = list(chain(prompt_ids, completion))[:max_length_tokens]
        begins = min(len(prompt_ids), max_length_tokens) if turn_end_id is not None else 0
        h.update(b"%d:" % begins + b",".join(b"%d" % i for i in whole) + b";")
    return h.hexdigest()
