"""Rows of every layout, of every shape that a hypothesis may draw, in which each piece of content has a word of its own."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from .drawn_messages import Pen, Row, answer, as_sharegpt, asked, question, spelled, spoken

ODD = (
    None, True, False, 0, 1, -3, 2.5, float("nan"), float("inf"), 10**400, 1 << 70, b"bytes", datetime.date(2024, 1, 2),
    "", " \n", "²", "--1", "1", "null", "[]", "{", "a\ud800", [], {}, [[]], [None], ["w900w"], {"w901w": "w902w"}, ("w904w",),
    [{"role": "user"}], {"role": ["user"], "content": ["w903w"]}, [{"from": ["human"], "value": "w905w"}],
    {"role": "user", "content": "w906w"},
)  # fmt: skip
ROLES = (
    "function", "ipython", "User", "ASSISTANT", "human", "gpt", "system", "developer", "tool", "observation", "", "tool_response",
)  # fmt: skip


@dataclass
class Case:
    """One row as a source holds it.

    Args:
        row: by the formats' own names of columns.
        renamed: the source's names of some of them, by the format's.
        roles: of those, what a recipe's `columns` calls them.
    """

    row: Row
    row_format: str = "auto"
    renamed: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)

    @property
    def source_row(self) -> Row:
        """Return the row by the source's names."""
        return {self.renamed.get(name, name): value for name, value in self.row.items()}


def whole_row(pen: Pen) -> Case:
    """Draw a row of one layout, and change it in up to three ways."""
    row_format = pen.pick(tuple(LAYOUTS))
    case = Case(LAYOUTS[row_format](pen))
    if pen.chance(5):
        case.row_format = pen.pick([row_format, *LAYOUTS])
    for _ in range(pen.pick((1, 0, 2, 3))):
        pen.pick(CHANGES)(pen, case)
    if pen.chance(4):
        rename(pen, case)
    return case


# --- layouts ---


def with_system(pen: Pen, row: Row) -> Row:
    return {**row, "system": pen.text()} if pen.chance(5) else row


def text(pen: Pen) -> Row:
    return with_system(pen, {"prompt": pen.text(), "chosen": pen.text(), "rejected": pen.text()})


def messages(pen: Pen) -> Row:
    turns = question(pen)
    answers = answer(pen), answer(pen)
    if pen.chance(4):
        chosen, rejected = (spelled(pen, [*turns, a]) for a in answers)
    else:
        chosen, rejected = (spoken(pen, a) for a in answers)
    return with_system(pen, {"prompt": spelled(pen, turns), "chosen": chosen, "rejected": rejected})


def implicit_messages(pen: Pen) -> Row:
    turns = question(pen)
    row = {name: spelled(pen, [*turns, answer(pen)]) for name in ("chosen", "rejected")}
    prompts = (
        {},
        {"prompt": turns[-1]["content"]},
        {"prompt": None},
        {"prompt": pen.text()},
        {"prompt": turns[-1]},
        {"question": pen.label()},
    )
    return with_system(pen, {**pen.pick(prompts), **row})


def implicit_text(pen: Pen) -> Row:
    shared = pen.text() + pen.pick((" ", "\n", "", "\t"))
    return with_system(pen, {"chosen": shared + pen.text(), "rejected": shared + pen.text()})


def transcript(pen: Pen) -> str:
    turns = [pen.text() if pen.chance(5) else ""]
    for _ in range(pen.pick((1, 2))):
        turns += [f"\n\nHuman: {pen.text()}", f"\n\nAssistant: {pen.text()}"]
    return "".join(turns[:-1]) + "\n\nAssistant:"


def hh(pen: Pen) -> Row:
    begin = transcript(pen)
    return with_system(pen, {"chosen": f"{begin} {pen.text()}", "rejected": f"{begin} {pen.text()}"})


def unpaired(pen: Pen) -> Row:
    row: Row = {"label": pen.pick((True, False, 1, "0", "true"))}
    if pen.chance(3):
        return with_system(pen, {**row, "completion": spelled(pen, [*question(pen), answer(pen)])})
    name = pen.pick(("prompt", "instruction", "question", "input", "messages"))
    return with_system(pen, {**row, name: asked(pen), "completion": spoken(pen, answer(pen))})


def scored(pen: Pen) -> Row:
    count = pen.pick((2, 3, 4))
    name = pen.pick(("prompt", "instruction", "question", "context"))
    row = with_system(pen, {name: transcript(pen) + " " if pen.chance(5) else asked(pen)})
    if pen.chance(2):
        list_name, scores = (
            pen.pick(("completions", "responses", "generations")),
            pen.pick(("scores", "ratings", "ranks")),
        )
        return {
            **row,
            list_name: [spoken(pen, answer(pen)) for _ in range(count)],
            scores: [pen.pick((1, 2, 2.5, "3", -1)) for _ in range(count)],
        }
    name, score = (
        pen.pick(("response", "answer", "completion", "text")),
        pen.pick(("overall_score", "score", "rating", "rank")),
    )
    items = [
        {name: spoken(pen, answer(pen)), score: pen.pick((1, 2, 2.5, "3")), "model": pen.label()} for _ in range(count)
    ]
    if pen.chance(6):
        items[0]["reasoning_content"] = pen.text()
    return {**row, "completions": items}


def nemo(pen: Pen) -> Row:
    items = [{"rank": i, "completion": [answer(pen)]} for i in range(pen.pick((2, 3)))]
    return with_system(pen, {"context": spelled(pen, question(pen)), "completions": items})


def verdicts(pen: Pen) -> Row:
    row = {"instruction": asked(pen), "input": pen.pick(("", pen.text())), "response1": spoken(pen, answer(pen))}
    row |= {"response2": spoken(pen, answer(pen)), **{f"annotator{i}": pen.pick((1, 2, 0, "1", None)) for i in (1, 2)}}
    return with_system(pen, row)


def alpaca(pen: Pen) -> Row:
    row: Row = {"instruction": pen.text(), "input": pen.pick(("", pen.text(), None))}
    if pen.chance(3):
        row["history"] = [[pen.text(), pen.text()] for _ in range(pen.pick((1, 2)))]
    if pen.chance(3):
        return with_system(pen, {**row, "output": pen.text(), "kto_tag": pen.pick((True, False))})
    return with_system(pen, {**row, "chosen": pen.text(), "rejected": pen.text()})


def sharegpt(pen: Pen) -> Row:
    turns = [as_sharegpt(pen, turn) for turn in question(pen)]
    if pen.chance(3):
        return with_system(
            pen, {"conversations": [*turns, as_sharegpt(pen, answer(pen))], "kto_tag": pen.pick((True, False))}
        )
    return with_system(
        pen, {"conversations": turns, **{n: as_sharegpt(pen, answer(pen)) for n in ("chosen", "rejected")}}
    )


def swift(pen: Pen) -> Row:
    if pen.chance(2):
        turns, name = question(pen), pen.pick(("rejected_response", "rejected_messages"))
        rejected = spelled(pen, [*turns, answer(pen)]) if pen.chance(3) else spoken(pen, answer(pen))
        return with_system(pen, {"messages": spelled(pen, [*turns, answer(pen)]), name: rejected})
    row: Row = {
        "query": pen.text(),
        "response": spoken(pen, answer(pen)),
        "rejected_response": spoken(pen, answer(pen)),
    }
    if pen.chance(3):
        row["history"] = [[pen.text(), pen.text()]]
    return with_system(pen, row)


def compared(pen: Pen) -> Row:
    if pen.chance(3):
        turns = question(pen)
        sides = {f"conversation_{side}": spelled(pen, [*turns, answer(pen)]) for side in "ab"}
        return with_system(
            pen, {**sides, "winner": pen.pick(("model_a", "model_b", "tie", "both_bad", "tie (bothbad)"))}
        )
    column, value = pen.pick(
        (
            ("better_response_id", 0),
            ("better_response_id", 1),
            ("overall_preference", -2),
            ("preference_strength", 3),
            ("winner", "b"),
        )
    )
    name, first = pen.pick(("prompt", "context", "instruction", "question")), pen.pick((0, 1))
    return with_system(
        pen, {name: asked(pen), **{f"response_{first + i}": spoken(pen, answer(pen)) for i in (0, 1)}, column: value}
    )


def axolotl(pen: Pen) -> Row:
    prompt, ends = pen.pick(
        (("question", ""), ("input", ""), ("instruction", "_response"), ("messages", ""), ("prompt", "_response"))
    )
    asks = spelled(pen, question(pen)) if prompt == "messages" else pen.text()
    return with_system(
        pen, {prompt: asks, **{f"{name}{ends}": spoken(pen, answer(pen)) for name in ("chosen", "rejected")}}
    )


LAYOUTS: dict[str, Callable[[Pen], Row]] = {
    each.__name__: each
    for each in (
        text, messages, implicit_messages, implicit_text, hh, unpaired, scored, nemo, verdicts, alpaca, sharegpt, swift,
        compared, axolotl,
    )
}  # fmt: skip


# --- changes ---


def other_value(pen: Pen, case: Case) -> None:
    """Put something odd at any place."""
    row = case.row = copy.deepcopy(case.row)
    places = [(row, name) for name in row]
    for holder, key in places:
        inner = holder[key]
        places += [
            (inner, k)
            for k in (inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ())
        ]
    holder, key = pen.pick(places)
    holder[key] = copy.deepcopy(pen.pick(ODD))


def other_role(pen: Pen, case: Case) -> None:
    row = case.row = copy.deepcopy(case.row)
    turns = [
        t
        for v in row.values()
        if isinstance(v, list)
        for t in v
        if isinstance(t, dict) and ("role" in t or "from" in t)
    ]
    if turns:
        turn = pen.pick(turns)
        turn["role" if "role" in turn else "from"] = pen.pick(ROLES)


def lost_column(pen: Pen, case: Case) -> None:
    name = pen.pick(tuple(case.row))
    if len(case.row) > 1:
        case.row = {k: v for k, v in case.row.items() if k != name}


def columns_of_another(pen: Pen, case: Case) -> None:
    other = LAYOUTS[pen.pick(tuple(LAYOUTS))](pen)
    names = [pen.pick(tuple(other))] if pen.chance(2) else list(other)
    case.row = {**{name: other[name] for name in names}, **case.row}


def null_columns(pen: Pen, case: Case) -> None:
    case.row = {**dict.fromkeys(LAYOUTS[pen.pick(tuple(LAYOUTS))](pen)), **case.row}


def context(pen: Pen, case: Case) -> None:
    name = pen.pick(("system", "history", "input"))
    value = [[pen.text(), pen.text()]] if name == "history" else pen.text()
    case.row = {**case.row, name: value}


def tools(pen: Pen, case: Case) -> None:
    function = {
        "name": pen.word(),
        "description": pen.text(),
        "parameters": {"type": "object", "properties": {pen.word(): {"type": "string", "title": None}}},
    }
    tool = function if pen.chance(3) else {"type": "function", "function": function}
    case.row = {
        **case.row,
        "tools": pen.pick(([tool], json.dumps([tool]), [json.dumps(tool)], tool, repr([tool]), (tool,))),
    }


def media(pen: Pen, case: Case) -> None:
    name = pen.pick(("images", "image", "videos", "audios", "audio", "image_url", "rejected_images", "chosen_image"))
    case.row = {**case.row, name: pen.pick(([pen.word()], pen.word(), {"bytes": b"w907w", "path": None}, [], None, ""))}


def labels(pen: Pen, case: Case) -> None:
    case.row = {
        **case.row,
        "id": pen.label(),
        "model": pen.label(),
        "score_chosen": 3.5,
        "meta": {"source": pen.label()},
        "tags": [pen.label()],
    }


CHANGES = (labels, tools, context, other_value, columns_of_another, null_columns, other_role, lost_column, media)
NAMED = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "label",
    "scores",
    "system",
    "history",
    "input",
    "query",
)


def rename(pen: Pen, case: Case) -> None:
    """Rename columns, and return the recipe's `columns` with the new names."""
    for name in [name for name in NAMED if name in case.row and pen.chance(2)]:
        case.renamed[name] = f"my_{name}"
        case.roles[name] = f"my_{name}"


@st.composite
def cases(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    """Draw a row of any shape."""
    return whole_row(Pen(draw))
