"""The reasons why a data row is not admitted. Each reason has a code, which never changes, and a meaning."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Reason(NamedTuple):
    """The kind and the meaning of a reason code.

    `fault`: the row itself is bad. Such rows count toward data.max_quarantined_fraction.
    `rule`: the row is sound, but a setting of the recipe excludes it.
    """

    kind: Literal["fault", "rule"]
    meaning: str


def _fault(meaning: str) -> Reason:
    return Reason("fault", meaning)


def _rule(meaning: str) -> Reason:
    return Reason("rule", meaning)


REASONS: dict[str, Reason] = {
    # reading
    "JSON_SYNTAX": _fault("the line is not JSON"),
    "CSV_SYNTAX": _fault("the row is not CSV: its quotes do not match"),
    "CSV_FIELDS": _fault("the row has more or fewer fields than the header"),
    "NOT_AN_OBJECT": _fault("the row is JSON, but not an object with named fields"),
    "INVALID_UTF8": _fault("the row is not UTF-8, or contains a lone surrogate"),
    "TOO_LONG_BYTES": _fault("the row is longer than the limit for one row"),
    # a whole file, or the rest of it; it counts as one row
    "SHARD_EMPTY": _fault("the file is empty, which is not valid for its kind of file"),
    "SHARD_BAD_MAGIC": _fault(
        "the first bytes do not match the kind of file: the name is wrong, or the file was overwritten"
    ),
    "SHARD_COMPRESSION": _fault("the compression of the file does not match its name"),
    "SHARD_ENCODING": _fault("the file is UTF-16 or UTF-32, not UTF-8"),
    "SHARD_PRETTY": _fault("the file is pretty-printed JSON, not JSON Lines: one object spans several lines"),
    "SHARD_TRUNCATED": _fault("the end of the file is missing"),
    "SHARD_DAMAGED": _fault("the content cannot be decoded, or does not match its checksum: the file was changed"),
    "SHARD_DUPLICATE_COLUMN": _fault("a column that the format needs occurs more than once in the file"),
    "SHARD_ARROW_EXTENSION": _fault("a column that the format needs has an Arrow extension type"),
    "SHARD_UNREADABLE": _fault("the file could not be read, or only up to this row"),
    # layout
    "UNKNOWN_FORMAT": _fault("the row has none of the known layouts"),
    "MISSING_PROMPT": _fault("there is no prompt, and the completions do not contain one"),
    "MISSING_CHOSEN": _fault("there is no chosen completion"),
    "MISSING_REJECTED": _fault("there is no rejected completion"),
    "MISSING_COMPLETION": _fault(
        "there is no completion, or there are fewer completions than scores, ranks or verdicts"
    ),
    "NULL_FIELD": _fault("a field that the format needs is null"),
    "WRONG_TYPE": _fault("a field has another type than the format requires"),
    "BAD_MESSAGE": _fault("a message is not an object with a role and text content"),
    "UNSUPPORTED_MEDIA": _fault("the row has images, videos or sound, which are not supported"),
    "BAD_ROLE": _fault("a message has an unknown role"),
    "NON_ALTERNATING_ROLES": _fault("turns of user and assistant do not alternate"),
    "LAST_TURN_NOT_ASSISTANT": _fault("a conversation does not end with an assistant turn"),
    "BAD_SCORE": _fault("a score, rank or rating is missing, or is not a finite number"),
    "BAD_LABEL": _fault("a label or verdict is not one that the format allows"),
    "BAD_TOOLS": _fault("the tools are not a list of JSON schemas, or the template's variables are not a mapping"),
    # content
    "EMPTY_PROMPT": _fault("the prompt has no text"),
    "EMPTY_CHOSEN": _fault("the chosen completion has no text"),
    "EMPTY_REJECTED": _fault("the rejected completion has no text"),
    "EMPTY_COMPLETION": _fault("a completion has no text"),
    "CONTROL_CHARS": _fault("the text contains control characters"),
    "IDENTICAL_PAIR": _fault("two completions are the same"),
    "PROMPT_MISMATCH": _fault("the completions do not answer the same prompt"),
    "SPECIAL_TOKEN_INJECTION": _fault("the text contains one of the tokenizer's special tokens"),
    # rendering and tokens
    "TEMPLATE_ERROR": _fault("the chat template refused the conversation"),
    "DROPPED_BY_TEMPLATE": _fault("the chat template does not write a part of the conversation"),
    "TEMPLATE_LIMIT": _fault("rendering took too long, needed too much memory, or produced too much text"),
    "PREFIX_BROKEN": _fault("the rendered conversation does not begin with the rendered prompt, as text or as tokens"),
    "NO_RESPONSE_TOKENS": _rule("a completion has no tokens, or two completions have the same tokens after truncation"),
    "PROMPT_TOO_LONG": _rule("the prompt is longer than data.max_prompt_tokens, or fills data.max_length_tokens"),
    "TOO_LONG": _rule(
        "prompt and completion exceed data.max_length_tokens, even after the cuts that data.truncation allows"
    ),
    # preferences
    "TIE": _rule("no completion is better than another, and data.pairing.ties is `drop`"),
    "LOW_MARGIN": _rule("no pair has scores that differ by data.pairing.min_margin or more"),
    "DISAGREEMENT": _rule("the verdicts differ, and data.pairing.annotators is `unanimous`"),
    # rules over all rows
    "FILTERED": _rule("a function of data.rules.filters excluded the row"),
    "CONFLICTING_PAIR": _rule("the data also holds the opposite preference"),
    "LEAKED_PROMPT": _rule("the prompt also occurs in held-out data"),
    "OVER_CAP": _rule("the source already has max_groups groups"),
    "OUTSIDE_MIXTURE": _rule("the source already has its share by weight"),
}

ADVICE: dict[str, str] = {
    "JSON_SYNTAX": "write one JSON object on each line (JSON Lines), or one JSON list of objects",
    "INVALID_UTF8": "save the file as UTF-8",
    "SHARD_ENCODING": "save the file as UTF-8",
    "SHARD_PRETTY": "write each object on one line (JSON Lines: `jq -c . FILE`), or all of them as one JSON list",
    "UNSUPPORTED_MEDIA": "use data that consists of text only, or remove these rows and columns",
    "CONTROL_CHARS": "set data.rules.control_characters=clean (removes these characters) or =keep, or correct the text",
    "SPECIAL_TOKEN_INJECTION": "remove these tokens from the text, or set data.rules.special_tokens=allow",
    "TEMPLATE_ERROR": "set data.chat_template to a template that accepts these conversations",
    "DROPPED_BY_TEMPLATE": "set data.chat_template to a template that writes this part, remove the part from the rows, or set "
    "data.rules.dropped_content=keep to train without it",
    "PREFIX_BROKEN": "before an answer is known, the template writes text (such as an opening <think>) that it does not "
    "write with the answer: set data.chat_template to a copy of the template without this text",
    "NO_RESPONSE_TOKENS": "raise data.max_length_tokens",
    "PROMPT_TOO_LONG": "raise data.max_length_tokens or data.max_prompt_tokens, or set data.truncation",
    "TOO_LONG": "raise data.max_length_tokens, or set data.truncation",
    "TIE": "set data.pairing.ties, or use data in which one completion is better",
    "LOW_MARGIN": "lower data.pairing.min_margin",
    "DISAGREEMENT": "set data.pairing.annotators=majority",
    "FILTERED": "check the functions of data.rules.filters",
    "CONFLICTING_PAIR": "correct the labels, or set data.rules.conflicts=keep",
    "LEAKED_PROMPT": "hold out other prompts than those of the training data, or set data.rules.leakage=keep",
    "OVER_CAP": "raise max_groups of the source",
    "OUTSIDE_MIXTURE": "change the weights of the sources",
}
"""Advice by reason code: what the user can do if most rows are excluded for this reason. Codes about the layout
have no advice."""

SAMPLE_CHARACTERS = 200
DETAIL_CHARACTERS = 300


class Rejected(Exception):
    """Raised, or returned, if a data row is rejected.

    `reason` is the reason code (a key of REASONS), and `detail` is a text about this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason  # noqa: S101 - codes are stable and listed
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def sample_of(row: object) -> str:
    """Convert a row to one short line of text that is safe to print in a terminal (no control characters)."""
    try:
        text = row.decode("utf-8", "backslashreplace") if isinstance(row, bytes) else str(row)
    except RecursionError:
        text = f"{type(row).__name__}, nested too deeply to show"
    return printable(text, SAMPLE_CHARACTERS)


def printable(text: str, limit_characters: int) -> str:
    """Shorten a text to `limit_characters`, and replace the characters that a terminal or UTF-8 does not accept."""
    text = text[: limit_characters * 2].encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= limit_characters else text[: limit_characters - 1] + "…"
