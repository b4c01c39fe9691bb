"""Length limits: which tokens of a prompt and its completions are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_ray.config.data import DataConfig
from dpo_ray.data.admission import Rejected


def truncate(
    prompt: np.ndarray, completions: Sequence[np.ndarray], config: DataConfig
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Truncate prompt + completion to the recipe's limits; the prompt is the same for all completions.

    keep_start cuts the completions' ends; keep_end cuts the prompt's start; drop cuts nothing.

    Raises:
        Rejected: cutting what may be cut is not sufficient.
    """
    limit, prompt_limit = config.max_length_tokens, config.max_prompt_tokens
    if prompt_limit is not None and len(prompt) > prompt_limit:
        if config.truncation != "keep_end":
            raise Rejected("PROMPT_TOO_LONG", f"{len(prompt)} tokens")
        prompt = prompt[-prompt_limit:]
    longest = max(map(len, completions))
    if len(prompt) + longest <= limit:
        return prompt, list(completions)
    match config.truncation:
        case "drop":
            raise Rejected("TOO_LONG", f"{len(prompt) + longest} tokens")
        case "keep_start":
            if len(prompt) >= limit:
                raise Rejected("PROMPT_TOO_LONG", f"{len(prompt)} tokens, which leaves none for a completion")
            return prompt, [completion[: limit - len(prompt)] for completion in completions]
        case "keep_end":
            if longest >= limit:
                raise Rejected("TOO_LONG", f"a completion alone has {longest} tokens")
            return prompt[longest - limit :], list(completions)
