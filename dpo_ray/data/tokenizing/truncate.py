"""Applies the recipe's length limits to the tokens of a prompt and its completions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_ray.config.data import DataConfig
from dpo_ray.data.admission import Rejected


def truncate(
    prompt: np.ndarray, completions: Sequence[np.ndarray], config: DataConfig
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Truncate a prompt and its completions to the recipe's limits. The prompt stays the same for all completions.

    data.truncation decides what is cut: `keep_start` cuts the ends of completions, `keep_end` cuts the start of the
    prompt, and `drop` cuts nothing.

    Raises:
        Rejected: PROMPT_TOO_LONG or TOO_LONG, if the limits are exceeded even after these cuts.
    """
    limit, prompt_limit = config.max_length_tokens, config.max_prompt_tokens
    if prompt_limit is not None and len(prompt) > prompt_limit:
        if config.truncation != "keep_end":
            raise Rejected("PROMPT_TOO_LONG", f"the prompt has {len(prompt)} tokens")
        prompt = prompt[-prompt_limit:]
    longest = max(map(len, completions))
    if len(prompt) + longest <= limit:
        return prompt, list(completions)
    match config.truncation:
        case "drop":
            raise Rejected("TOO_LONG", f"the prompt and the longest completion have {len(prompt) + longest} tokens")
        case "keep_start":
            if len(prompt) >= limit:
                raise Rejected(
                    "PROMPT_TOO_LONG", f"the prompt has {len(prompt)} tokens, so that none are left for a completion"
                )
            return prompt, [completion[: limit - len(prompt)] for completion in completions]
        case "keep_end":
            if longest >= limit:
                raise Rejected("TOO_LONG", f"a completion alone has {longest} tokens")
            return prompt[longest - limit :], list(completions)
