"""A recipe that is valid as it is, for tests that make it wrong."""

from __future__ import annotations

import yaml

GOOD = {
    "name": "wrong",
    "model": {"path": "builtin:sentiment_llama"},
    "data": {
        "train": {"type": "synthetic", "pairs": 32},
        "eval": {"type": "synthetic", "pairs": 8},
        "chat_template": "plain",
        "max_length_tokens": 128,
    },
}


def good(**changes: object) -> str:
    """Return its YAML text with other sections; None leaves one out."""
    return yaml.safe_dump({k: v for k, v in {**GOOD, **changes}.items() if v is not None})
