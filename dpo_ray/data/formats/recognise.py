"""Recognises the format of a row from its columns and their values.

The order of the checks matters: layouts with a chosen and a rejected answer come first, then layouts with labels, then
lists of completions. The reason is that rows of the first kind often also have columns of the later layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import DETAIL_CHARACTERS, Rejected

from .catalog import FORMATS, fields_of
from .compared import SIDES
from .fields import Fields
from .hh import ASSISTANT

WITHIN_COMPLETIONS = ("implicit_messages", "implicit_text", "hh")
"""Formats whose completions contain the prompt."""

PROMPTS = ("prompt", "conversations", "messages", "instruction", "question", "input")


def recognise(row: Mapping[str, Any], columns: Columns) -> str:
    """Return the name of the format that a row has.

    Null columns are ignored at first, because in a table each row has all columns. Only if no format is found in this
    way, null columns are considered too.

    Raises:
        Rejected: UNKNOWN_FORMAT.
    """
    given = {name: value for name, value in row.items() if value is not None}
    added = (each.name for each in FORMATS.values() if each.matches is not None and each.matches(given))
    found = next(added, None) or _layout(given, row, columns) or _layout(row, row, columns) or _meant(columns)
    if found is None:
        raise Rejected("UNKNOWN_FORMAT", f"the row has: {', '.join(map(str, row))}"[:DETAIL_CHARACTERS])
    return found


def _layout(given: Mapping[str, Any], row: Mapping[str, Any], columns: Columns) -> str | None:
    def has(row_format: str, role: str) -> bool:
        fields = fields_of(given, row_format, columns)
        if role == "annotators":  # the value of an annotator who gave no verdict is null
            return any(name in given for name in fields.spread(role))
        spread = fields.spread(role) if role == "completions" else ()
        return all(name in given for name in spread or (fields.column(role),))

    if has("swift", "rejected") and not has("axolotl", "chosen") and ("messages" in given or has("swift", "query")):
        return "swift"
    fields = fields_of(given, "axolotl", columns)
    if fields.column("chosen") in given or fields.column("rejected") in given:
        return _pair(fields, row)
    if has("compared", "preference") and (
        SIDES[0] in given or len(fields_of(given, "compared", columns).spread("completions")) == 2
    ):
        return "compared"
    if has("sharegpt", "label"):
        if "conversations" in given:
            return "sharegpt"
        if has("unpaired", "completion"):
            return "unpaired"
        if isinstance(given.get("messages"), list | tuple):
            return "sharegpt"
        if has("alpaca", "completion") and has("alpaca", "prompt"):
            return "alpaca"
    if has("verdicts", "completions") and has("verdicts", "annotators"):
        return "verdicts"
    if has("scored", "completions"):
        return "nemo" if _is_nemo(given) else "scored"
    return None


def _pair(fields: Fields, row: Mapping[str, Any]) -> str:
    """Return the format of a row with a chosen and a rejected answer, by the prompt's column and the types of the values."""
    given, columns = fields.row, fields.columns
    chosen, rejected = fields.get("chosen"), fields.get("rejected")
    prompt = columns.prompt or next((name for name in PROMPTS if name in given), None)
    if prompt not in (columns.prompt, "prompt") and (_is_conversation(chosen) or _is_dialogue(chosen)):
        prompt = None  # chosen contains the prompt, so this column means something else
    argilla = {"chosen_response", "rejected_response"} & {fields.column("chosen"), fields.column("rejected")}
    match prompt:
        case "conversations":
            return "sharegpt"
        case "messages":
            return "axolotl"
        case "instruction":
            return "axolotl" if argilla else "alpaca"
        case "question" | "input":
            return "axolotl"
    if columns.input or columns.history:
        return "alpaca"
    name = columns.prompt or "prompt"
    if argilla and name in given:
        return "axolotl"
    return _trl(given.get(name), name in row, chosen, rejected)


def _trl(prompt: Any, has_prompt: bool, chosen: Any, rejected: Any) -> str:
    if has_prompt and prompt is None and not (_is_conversation(chosen) or _is_conversation(rejected)):
        return "text"  # this format rejects the row with a message that the prompt is null
    if isinstance(prompt, list | tuple):
        return "messages"
    if any(isinstance(value, list | tuple | Mapping) for value in (chosen, rejected)):
        return "implicit_messages"
    if prompt is not None:
        return "text"
    return "hh" if isinstance(chosen, str) and ASSISTANT in chosen else "implicit_text"


def check_context(fields: Fields, row_format: str) -> None:
    """Check that the recognised format reads columns such as `history` or `input`, so that no text of the row is lost.

    Nothing is checked if the prompt is a list of messages, if the completions contain the prompt, or if the recipe names
    the column of the prompt.

    Raises:
        Rejected: UNKNOWN_FORMAT.
    """
    prompt = fields.get("prompt")
    if fields.columns.prompt or not isinstance(prompt, str) or row_format in WITHIN_COMPLETIONS:
        return
    read = {fields.column(role) for role in ("prompt", "input", "query", "history") if role in fields.names}
    for name, kind in (("history", list | tuple), ("input", str), ("query", str)):
        value = fields.row.get(name)
        if (
            name in read
            or not isinstance(value, kind)
            or not value
            or (isinstance(value, str) and value.strip() in prompt)
        ):
            continue
        detail = f"the row has `{name}`, which the format {row_format} does not read: set `format`, or `columns.prompt`"
        raise Rejected("UNKNOWN_FORMAT", detail)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 1


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and ASSISTANT in value


def _is_nemo(given: Mapping[str, Any]) -> bool:
    columns = FORMATS["nemo"].columns
    (prompt,), (completions,) = columns["prompt"], columns["completions"]
    items = given.get(completions)
    nested = isinstance(items, list | tuple) and all(isinstance(i, Mapping) and "completion" in i for i in items)
    return nested and prompt in given and not {"prompt", "instruction"} & given.keys()


def _meant(columns: Columns) -> str | None:
    """Choose a format by the column names that the recipe sets, for a row that fits no format.

    When the row is read in this format, it is rejected with a message that names the missing column.
    """
    if columns.chosen or columns.rejected:
        return "text"
    if columns.completion or columns.label:
        return "unpaired"
    if columns.annotators:
        return "verdicts"
    return "scored" if columns.completions else None
