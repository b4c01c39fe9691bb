"""Rows in the layouts that people publish, all of the same content (fixtures/formats), and how tests read rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.data.formats.read import text_group
from dpo_ray.data.groups import TextGroup

PROMPT, CHOSEN, REJECTED = "Which planet is the largest?", "Jupiter is the largest.", "Saturn is the largest."

FORMATS = {
    "trl_standard": "text",
    "trl_standard_implicit": "implicit_text",
    "trl_conversational": "messages",
    "trl_conversational_implicit": "implicit_messages",
    "ultrafeedback_binarized": "implicit_messages",
    "hh_rlhf": "hh",
    "ultrafeedback": "scored",
    "nectar": "scored",
    "scores": "scored",
    "ranks": "scored",
    "distilabel": "scored",
    "nemo_rl": "nemo",
    "llama_factory_alpaca": "alpaca",
    "llama_factory_sharegpt": "sharegpt",
    "axolotl_chat_template": "axolotl",
    "axolotl_intel": "axolotl",
    "axolotl_argilla": "axolotl",
    "axolotl_icr": "axolotl",
    "axolotl_prompt_pairs": "text",
    "axolotl_ultra": "implicit_messages",
    "pandalm": "verdicts",
    "swift_messages": "swift",
    "swift_rejected_messages": "swift",
    "swift_query": "swift",
    "pku_saferlhf": "compared",
    "helpsteer2_preference": "compared",
    "helpsteer3": "compared",
    "chatbot_arena": "compared",
    "unpaired_trl_standard": "unpaired",
    "unpaired_trl_conversational": "unpaired",
    "unpaired_kto_mix": "unpaired",
    "unpaired_llama_factory_alpaca": "alpaca",
    "unpaired_llama_factory_sharegpt": "sharegpt",
    "unpaired_llama_factory_openai": "sharegpt",
    "unpaired_axolotl_intel": "unpaired",
}
"""The format that each layout is recognised as."""

PAIRS = [name for name in FORMATS if not name.startswith("unpaired")]
UNPAIRED = [name for name in FORMATS if name.startswith("unpaired")]


def published_row(name: str) -> dict[str, Any]:
    """Read a fixture."""
    path = Path(__file__).parents[1] / "unit/data/fixtures/formats" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def read(
    row: dict[str, Any], row_format: Any = "auto", criteria: dict[str, float] | None = None, **columns: Any
) -> TextGroup:
    """Read a row, with the recipe's `columns` as keywords."""
    return text_group(row, row_format, Columns(**columns), criteria or {})


def reason(row: dict[str, Any], row_format: Any = "auto", **columns: Any) -> str:
    """Name the reason for which a row is rejected."""
    with pytest.raises(Rejected) as caught:
        read(row, row_format, **columns)
    return caught.value.reason


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def said(group: TextGroup) -> tuple[tuple, tuple]:
    """Name the turns of the prompt and the completions, as they go into a chat template."""
    turns = group.prompt if group.messages is None else group.messages
    turns = (user(turns),) if isinstance(turns, str) else turns
    return turns, tuple(c.strip() if isinstance(c, str) else c for c in group.completions)
