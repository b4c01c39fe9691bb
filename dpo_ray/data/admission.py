"""Why a row is not admitted: stable reason codes, each with its meaning."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "JSON_SYNTAX": "the line is not JSON",
    "NOT_AN_OBJECT": "the line is JSON, but not an object with named fields",
    "INVALID_UTF8": "the line is not UTF-8, or holds a lone surrogate",
    "TOO_LONG_BYTES": "the line is longer than the limit for one row",
    "SHARD_UNREADABLE": "the file broke off or could not be read from here on; it counts as one row",
    "MISSING_PROMPT": "there is no prompt, and chosen and rejected do not hold one",
    "MISSING_CHOSEN": "there is no chosen completion",
    "MISSING_REJECTED": "there is no rejected completion",
    "NULL_FIELD": "prompt, chosen or rejected is null",
    "WRONG_TYPE": "prompt, chosen or rejected is neither text nor a list of messages",
    "BAD_MESSAGE": "a message is not an object with a role and text content",
    "BAD_ROLE": "a message has a role other than system, user, assistant or tool",
    "LAST_TURN_NOT_ASSISTANT": "chosen or rejected does not end with a turn of the assistant",
    "EMPTY_PROMPT": "the prompt has no text",
    "EMPTY_CHOSEN": "chosen has no text",
    "EMPTY_REJECTED": "rejected has no text",
    "IDENTICAL_PAIR": "chosen and rejected are the same",
    "PROMPT_MISMATCH": "chosen and rejected do not answer the same prompt",
    "TEMPLATE_ERROR": "the chat template refused the conversation",
    "PREFIX_BROKEN": "the rendered prompt is not how the rendered conversation begins, as text or as tokens",
    "NO_RESPONSE_TOKENS": "after truncation nothing is left of a completion, or nothing differs",
    "TOO_LONG": "longer than data.max_length_tokens, and data.truncation is `drop`",
}

SAMPLE_CHARACTERS = 200
DETAIL_CHARACTERS = 300


class Rejected(Exception):
    """Carry the reason code and the detail of one row that is not admitted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason  # noqa: S101 - codes are stable and listed
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def sample_of(row: object) -> str:
    """Shorten a row to one printable line, safe to show in a terminal (no control characters)."""
    try:
        text = row.decode("utf-8", "backslashreplace") if isinstance(row, bytes) else str(row)
    except RecursionError:
        text = f"{type(row).__name__}, nested too deeply to show"
    return printable(text, SAMPLE_CHARACTERS)


def printable(text: str, limit_characters: int) -> str:
    """Replace what a terminal or UTF-8 would not take, and shorten; input data gets into every detail."""
    text = text[: limit_characters * 2].encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= limit_characters else text[: limit_characters - 1] + "…"
