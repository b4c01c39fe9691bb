"""Rows that hold two completions and a verdict on them, and ms-swift's rows: which completion is the better one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpo_ray.config.data import PairingConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.pairing import paired
from tests.helpers.published_rows import answer, published_row, read, reason, user

TWO = {"prompt": "q", "response_1": "first", "response_2": "second"}


def better(row: dict[str, Any]) -> str | None:
    """Return the chosen completion, or None for a tie."""
    group = read(row)
    if group.verdicts == (0,):
        with pytest.raises(Rejected, match="TIE"):
            paired(group, PairingConfig())
        return None
    group = paired(group, PairingConfig())
    return str(group.completions[group.chosen[0]])


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("preference_strength", -3, "first"),
        ("preference_strength", 2, "second"),
        ("preference_strength", 0, None),
        ("preference_strength", "-1", "first"),  # CSV only has text
        ("overall_preference", 1.0, "second"),
        ("better_response_id", 0, "first"),
        ("better_response_id", 1, "second"),
        ("better_response_id", "1", "second"),
        ("winner", "model_a", "first"),
        ("winner", "Model_B", "second"),
        ("winner", "tie", None),
        ("winner", "tie (bothbad)", None),
    ],
)
def test_the_better_one_is_the_one_that_the_column_names(column: str, value: Any, expected: str | None) -> None:
    assert better({**TWO, column: value}) == expected


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("preference_strength", "strong"),
        ("better_response_id", 2),
        ("better_response_id", True),
        ("winner", "model_c"),
        ("winner", 1),
        ("overall_preference", "²"),
        ("overall_preference", "--1"),
        ("overall_preference", "9" * 5000),
    ],
)
def test_a_verdict_that_names_neither_is_a_bad_label(column: str, value: Any) -> None:
    assert reason({**TWO, column: value}) == "BAD_LABEL"


def test_a_word_may_name_the_column_of_the_better_one() -> None:
    from_zero = {"prompt": "q", "response_0": "first", "response_1": "second"}
    for row, names in ((from_zero, ("0", "1")), (TWO, ("1", "2"))):
        assert [better({**row, "winner": name}) for name in names] == ["first", "second"]
        assert [better({**row, "winner": f"response_{name}"}) for name in names] == ["first", "second"]
    assert reason({**from_zero, "winner": "response_2"}) == reason({**from_zero, "winner": "2"}) == "BAD_LABEL"
    group = read(
        {"q": "q", "x": "a", "y": "b", "pick": "y"}, "compared", prompt="q", completions=("x", "y"), preference="pick"
    )
    assert group.verdicts == (2,)


def test_columns_that_contradict_each_other_are_a_bad_label() -> None:
    assert reason({**TWO, "better_response_id": 0, "winner": "model_b"}) == "BAD_LABEL"
    assert reason({**TWO, "overall_preference": -1, "preference_strength": 1}) == "BAD_LABEL"
    assert better({**TWO, "better_response_id": 0, "winner": "model_a"}) == "first"
    assert better({**TWO, "better_response_id": 0, "winner": "some-model"}) == "first"  # which tells no side
    assert better({**TWO, "better_response_id": 0, "safer_response_id": 1}) == "first"  # another question
    assert better({**TWO, "better_response_id": None, "safer_response_id": 1}) == "second"


def test_a_prompt_beside_a_battle_is_that_of_its_conversations() -> None:
    row = published_row("chatbot_arena")
    assert read({**row, "prompt": "Which planet is the largest?"}) == read(row)
    assert reason({**row, "prompt": "something else"}) == "PROMPT_MISMATCH"
    assert reason({**row, "response_0": "another", "response_1": "answer"}) == "UNKNOWN_FORMAT"


def test_conversations_of_a_battle_may_be_text_that_holds_messages() -> None:
    row = published_row("chatbot_arena")
    assert read({**row, **{side: json.dumps(row[side]) for side in ("conversation_a", "conversation_b")}}) == read(row)


def test_a_recipe_may_name_the_columns() -> None:
    row = {"q": "q", "x": "first", "y": "second", "pick_id": 1}
    group = read(row, "compared", prompt="q", completions=("x", "y"), preference="pick_id")
    assert group.verdicts == (2,)


def test_conversations_that_differ_before_their_end_are_no_pair() -> None:
    row = published_row("chatbot_arena")
    earlier = [user("hi"), answer("hello")]
    row["conversation_a"] = [*earlier, *row["conversation_a"]]
    assert reason(row) == "PROMPT_MISMATCH"
    row["conversation_b"] = [*earlier, *row["conversation_b"]]
    assert len(read(row).prompt) == 3


def test_a_battle_is_between_two_conversations() -> None:
    row = published_row("chatbot_arena")
    assert reason({**row, "conversation_b": None}) == "WRONG_TYPE"
    assert reason({**row, "winner": None}, "compared") == "NULL_FIELD"


class TestSwift:
    def test_a_conversation_has_its_system_text_and_history(self) -> None:
        row = {"query": "q", "response": "good", "rejected_response": "bad", "history": [["a", "b"]], "system": "s"}
        assert read(row).prompt == ({"role": "system", "content": "s"}, user("a"), answer("b"), user("q"))
        assert read(row).completions == ("good", "bad")

    @pytest.mark.parametrize("rejected", ["bad", answer("bad"), [answer("bad")], [user("q"), answer("bad")]])
    def test_the_rejected_answer_may_be_text_or_messages(self, rejected: Any) -> None:
        row = {"messages": [user("q"), answer("good")], "rejected_response": rejected}
        assert read(row).completions == ("good", "bad")
        assert read(row).prompt == (user("q"),)

    def test_what_is_no_pair_has_its_reason(self) -> None:
        messages = [user("q"), answer("good")]
        assert reason({"messages": messages, "rejected_messages": [user("r"), answer("bad")]}) == "PROMPT_MISMATCH"
        assert reason({"messages": messages[1:], "rejected_response": "bad"}) == "MISSING_PROMPT"
        assert reason({"messages": [*messages, user("r")], "rejected_response": "bad"}) == "LAST_TURN_NOT_ASSISTANT"
        assert reason({"messages": messages, "rejected_response": "good"}) == "IDENTICAL_PAIR"

    def test_the_rejected_conversation_may_have_the_system_text_as_well(self) -> None:
        row = {"messages": [user("q"), answer("good")], "rejected_messages": [user("q"), answer("bad")], "system": "s"}
        system = {"role": "system", "content": "s"}
        assert read({**row, "rejected_messages": [system, *row["rejected_messages"]]}) == read(row)
        assert read(row).prompt == (system, user("q"))

    def test_what_stands_beside_a_conversation_says_the_same(self) -> None:
        row = {"messages": [user("q"), answer("good")], "rejected_response": "bad"}
        assert read({**row, "query": "q", "response": "good", "history": []}) == read(row)
        for beside in ({"query": "r"}, {"response": "better"}, {"history": [["a", "b"]]}):
            assert reason({**row, **beside}) == "PROMPT_MISMATCH"

    def test_its_rejected_images_are_named(self) -> None:
        row = {"messages": [user("q"), answer("good")], "rejected_response": "bad", "rejected_images": ["cat.png"]}
        assert reason(row) == "UNSUPPORTED_MEDIA"

    def test_its_tool_turns_are_read(self) -> None:
        turns = [user("u"), {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}]
        turns += [{"role": "tool_response", "content": "ok"}, answer("good")]
        group = read({"messages": turns, "rejected_response": "bad"})
        assert [m["role"] for m in group.prompt] == ["user", "assistant", "tool"]
