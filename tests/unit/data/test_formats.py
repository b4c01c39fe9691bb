"""Every layout that preference data is published in is recognised, and read as what it says."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.config.data import PairingConfig
from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.data.formats.catalog import wanted
from dpo_ray.data.formats.read import text_group
from dpo_ray.data.formats.recognise import recognise
from dpo_ray.data.groups import TextGroup
from dpo_ray.data.pairing import paired
from tests.helpers.published_rows import (
    CHOSEN,
    FORMATS,
    PAIRS,
    PROMPT,
    REJECTED,
    UNPAIRED,
    answer,
    published_row,
    read,
    reason,
    said,
    system,
    user,
)


@pytest.mark.parametrize("name", PAIRS)
def test_published_pairs_and_lists_have_the_same_content(name: str):
    group = paired(read(published_row(name)), PairingConfig())
    assert said(group) == ((user(PROMPT),), (CHOSEN, REJECTED))
    assert (group.chosen, group.rejected, group.preference_probability) == ((0,), (1,), 1.0)


@pytest.mark.parametrize("name", UNPAIRED)
def test_published_unpaired_examples_have_the_same_content(name: str):
    group = paired(read(published_row(name)), PairingConfig())
    assert said(group) == ((user(PROMPT),), (CHOSEN,))
    assert (group.scores, group.chosen, group.rejected) == ((1.0,), (), ())


@pytest.mark.parametrize("name", FORMATS)
def test_named_format_agrees_with_auto(name: str):
    row = published_row(name)
    assert recognise(row, Columns()) == FORMATS[name]
    assert read(row, FORMATS[name]) == read(row)


@pytest.mark.parametrize("name", FORMATS)
def test_row_of_a_table_that_holds_all_layouts(name: str):
    """A table has every column in every row; those of other layouts are null."""
    columns = {column for other in FORMATS for column in published_row(other)} - {"prompt"}
    row = {**dict.fromkeys(columns), **published_row(name)}
    assert read(row) == read(published_row(name))


@pytest.mark.parametrize("name", FORMATS)
def test_wanted_columns_suffice(name: str):
    row = {**published_row(name), "embedding": [0.5], "source": "web"}
    columns = wanted(list(row), Columns())
    assert "embedding" not in columns
    assert read({column: row[column] for column in columns}) == read(row)


def test_wanted_columns_are_all_where_no_format_is_complete():
    assert wanted(["prompt", "good", "bad"], Columns()) == ["prompt", "good", "bad"]
    assert wanted(["prompt", "good", "bad", "id"], Columns(chosen="good", rejected="bad")) == ["prompt", "good", "bad"]
    assert wanted(["q", "r_1", "r_2", "a1", "id"], Columns(prompt="q", completions=("r_1", "r_2"), annotators=("a1",)))[
        -1
    ] == ("a1")


class TestPairs:
    def test_text_stays_text_and_messages_stay_messages(self):
        assert read(published_row("trl_standard")) == TextGroup(PROMPT, (CHOSEN, REJECTED), (1.0, 0.0))
        assert read(published_row("trl_conversational")) == TextGroup((user(PROMPT),), (CHOSEN, REJECTED), (1.0, 0.0))

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": [user("Hi")], "chosen": "yes", "rejected": "no"},
            {"prompt": [user("Hi")], "chosen": [user("Hi"), answer("yes")], "rejected": [user("Hi"), answer("no")]},
            {
                "prompt": [user("Hi")],
                "chosen": [{**user("Hi"), "name": None}, answer("yes")],
                "rejected": [{**user("Hi"), "name": None}, answer("no")],
            },
            {"prompt": "Hi", "chosen": [answer("yes")], "rejected": [answer("no")]},
            {"prompt": "Hi", "chosen": answer("yes"), "rejected": answer("no")},
        ],
        ids=["answers as text", "prompt repeated", "more fields", "prompt as text", "answers as messages"],
    )
    def test_mixed_forms(self, row):
        assert read(row) == TextGroup((user("Hi"),), ("yes", "no"), (1.0, 0.0))

    def test_only_the_last_turn_is_the_completion(self):
        turns = [user("a"), answer("b"), user("c")]
        group = read({"chosen": [*turns, answer("d")], "rejected": [*turns, answer("e")]})
        assert said(group) == (tuple(turns), ("d", "e"))

    def test_system_column_stands_first_unless_the_prompt_begins_with_it(self):
        row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "system": "Be kind."}
        assert said(read(row))[0] == (system("Be kind."), user("Hi"))
        own = {**row, "prompt": [system("Be kind."), user("Hi")]}
        assert said(read(own))[0] == (system("Be kind."), user("Hi"))
        assert reason({**own, "system": "Be brief."}) == "PROMPT_MISMATCH"

    def test_implicit_text_splits_no_word(self):
        group = read({"chosen": "It was brilliant.", "rejected": "It was broken."})
        assert (group.prompt, group.completions) == ("It was", (" brilliant.", " broken."))
        group = read({"chosen": "a b", "rejected": "a b c"}, "implicit_text")
        assert (group.prompt, group.completions) == ("a", (" b", " b c"))

    @pytest.mark.parametrize("name", ["trl_standard_implicit", "trl_conversational_implicit", "hh_rlhf"])
    def test_null_prompt_is_none_where_the_format_takes_none(self, name: str):
        row, row_format = published_row(name), FORMATS[name]
        assert read({**row, "prompt": None}, row_format) == read(row, row_format)
        assert reason({**published_row("trl_standard"), "prompt": None}) == "NULL_FIELD"

    def test_other_columns_do_not_hide_a_whole_conversation(self):
        row = published_row("trl_conversational_implicit")
        assert read({**row, "instruction": "something else", "input": ["x"]}) == read(row)
        row = published_row("hh_rlhf")
        assert read({**row, "question": "something else"}) == read(row)

    @pytest.mark.parametrize("row_format", ["auto", "text"])
    def test_renamed_columns(self, row_format: str):
        row = {"question": "Hi", "better": "a", "worse": "b", "chosen": "another thing"}
        columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
        assert read(row, row_format, **columns) == TextGroup("Hi", ("a", "b"), (1.0, 0.0))
        assert reason({"question": "Hi"}, row_format, **columns) == "MISSING_CHOSEN"

    def test_openrlhf_with_its_own_keys(self):
        row = {"context_messages": [user("Hi")], "good": [answer("a")], "bad": [answer("b")]}
        group = read(row, prompt="context_messages", chosen="good", rejected="bad")
        assert said(group) == ((user("Hi"),), ("a", "b"))


class TestTranscripts:
    def test_several_turns_keep_the_text_and_the_turns(self):
        begin = "\n\nHuman: What is\n\nthat?\n\nAssistant: A cat.\n\nHuman: And that?\n\nAssistant:"
        group = read({"chosen": f"{begin} A dog.", "rejected": f"{begin} Go away."})
        assert (group.prompt, group.completions) == (begin, (" A dog.", " Go away."))
        assert group.messages == (user("What is\n\nthat?"), answer("A cat."), user("And that?"))

    def test_text_before_the_first_turn_is_the_systems(self):
        begin = "Be kind.\n\nHuman: Hi\n\nAssistant:"
        group = read({"chosen": f"{begin} a", "rejected": f"{begin} b"}, "hh")
        assert group.messages == (system("Be kind."), user("Hi"))

    def test_stripped_beginning(self):
        group = read({"chosen": "Human: Hi\n\nAssistant: yes", "rejected": "Human: Hi\n\nAssistant: no"})
        assert said(group) == ((user("Hi"),), ("yes", "no"))

    def test_nectar_is_the_same_text_as_hh(self):
        """White space goes with the answer, so that untemplated text has the same tokens."""
        nectar, hh = paired(read(published_row("nectar")), PairingConfig()), read(published_row("hh_rlhf"))
        assert (nectar.prompt, nectar.completions) == (hh.prompt, hh.completions)


class TestScores:
    def test_ultrafeedback_takes_the_overall_score(self):
        group = read(published_row("ultrafeedback"))
        assert group.scores == (3.0, 1.0, 7.0, 9.5)
        assert len(group.completions) == 4
        assert group.chosen == group.rejected == ()

    def test_another_score_by_its_name(self):
        assert read(published_row("ultrafeedback"), scores="fine-grained_score").scores == (2.0, 1.33, 4.0, 4.75)

    def test_criteria_are_a_weighted_mean_of_the_ratings_that_are_numbers(self):
        group = read(published_row("ultrafeedback"), criteria={"helpfulness": 3.0, "honesty": 1.0})
        assert group.scores == ((3 * 2 + 3) / 4, 1.0, (3 * 3 + 4) / 4, (3 * 4 + 5) / 4)  # the second has honesty "N/A"

    def test_score_that_one_completion_lacks_gives_way_to_the_next_that_all_have(self):
        row = published_row("ultrafeedback")
        row["completions"][2]["overall_score"] = None
        assert read(row).scores == (2.0, 1.33, 4.0, 4.75)

    @pytest.mark.parametrize("name", ["nectar", "ranks", "nemo_rl"])
    def test_lowest_rank_is_best_and_ranks_count_down_to_zero(self, name: str):
        group = read(published_row(name))
        best = max(range(len(group.scores)), key=group.scores.__getitem__)
        assert str(group.completions[best]).strip() == CHOSEN
        assert sorted(group.scores) == list(range(len(group.scores)))

    def test_columns_of_completions_and_scores(self):
        row = {"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "score_A": 3, "score_B": "8"}
        group = read(row, prompt="history", completions=("human_ref_A", "human_ref_B"), scores=("score_A", "score_B"))
        assert (group.completions, group.scores) == (("a", "b"), (3.0, 8.0))

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"scores": [1.0, None, 2.0]}, "BAD_SCORE"),
            ({"scores": [1.0, float("nan"), 2.0]}, "BAD_SCORE"),
            ({"scores": [1.0, 1e39, 2.0]}, "BAD_SCORE"),
            ({"scores": [1.0, True, 2.0]}, "BAD_SCORE"),
            ({"scores": [1.0, 2.0]}, "BAD_SCORE"),
            ({"scores": [1.0, 2.0, 3.0, 4.0]}, "MISSING_COMPLETION"),
            ({"scores": None}, "BAD_SCORE"),
            ({"scores": 1.0}, "WRONG_TYPE"),
            ({"completions": ["a"], "scores": [1.0]}, "MISSING_COMPLETION"),
            ({"completions": ["a", None, "b"]}, "NULL_FIELD"),
            ({"completions": ["a", " ", "b"]}, "EMPTY_COMPLETION"),
            ({"completions": ["a", "a", "a"]}, "IDENTICAL_PAIR"),
            ({"completions": [{"text": "a"}, {"txt": "b"}, "c"]}, "MISSING_COMPLETION"),
            ({"completions": "a"}, "WRONG_TYPE"),
            ({"prompt": ""}, "EMPTY_PROMPT"),
        ],
    )
    def test_bad_lists(self, change: dict[str, Any], expected: str):
        assert reason({**published_row("scores"), **change}) == expected

    def test_criterion_that_is_not_there(self):
        with pytest.raises(Rejected, match="safety"):
            read(published_row("ultrafeedback"), criteria={"safety": 1.0})


class TestVerdicts:
    def test_verdicts_are_kept_as_they_are(self):
        row = {**published_row("pandalm"), "annotator1": 0, "annotator2": 1}
        group = read(row)
        assert (group.completions, group.verdicts, group.scores) == ((REJECTED, CHOSEN), (0, 1, 2), ())

    def test_input_follows_the_instruction_after_a_blank_line(self):
        row = {**published_row("pandalm"), "instruction": "Translate.", "input": "Hallo"}
        assert read(row).prompt == "Translate.\n\nHallo"

    def test_columns_by_name(self):
        row = {"q": "Hi", "left": "a", "right": "b", "Ann": "1", "Bob": 2.0, "Cem": None}
        columns = {"prompt": "q", "completions": ("left", "right"), "annotators": ("Ann", "Bob", "Cem")}
        assert read(row, **columns).verdicts == (1, 2)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"annotator2": 3}, "BAD_LABEL"),
            ({"annotator2": "left"}, "BAD_LABEL"),
            ({"annotator2": True}, "BAD_LABEL"),
            ({"response1": True}, "WRONG_TYPE"),
            ({"response1": ""}, "EMPTY_COMPLETION"),
            ({"response1": None}, "NULL_FIELD"),
            ({"response1": CHOSEN}, "IDENTICAL_PAIR"),
            ({"response3": "Mars."}, "WRONG_TYPE"),
            (dict.fromkeys(("annotator1", "annotator2", "annotator3")), "BAD_LABEL"),
        ],
    )
    def test_bad_verdicts(self, change: dict[str, Any], expected: str):
        assert reason({**published_row("pandalm"), **change}, "verdicts") == expected


class TestUnpaired:
    @pytest.mark.parametrize(
        ("label", "score"), [(True, 1.0), (False, 0.0), (1, 1.0), (0.0, 0.0), ("True", 1.0), ("false", 0.0)]
    )
    def test_labels(self, label: Any, score: float):
        assert read({"prompt": "Hi", "completion": "a", "label": label}).scores == (score,)

    def test_bad_rows(self):
        assert reason({"prompt": "Hi", "completion": "a", "label": "good"}) == "BAD_LABEL"
        assert reason({"prompt": "Hi", "completion": "a", "label": None}) == "BAD_LABEL"
        assert reason({"prompt": "Hi", "completion": "a"}, "unpaired") == "BAD_LABEL"
        assert reason({"prompt": "Hi", "completion": " ", "label": True}) == "EMPTY_COMPLETION"
        assert reason({"prompt": "Hi", "label": True}, "unpaired") == "MISSING_COMPLETION"
        assert reason({"completion": [answer("a")], "label": True}) == "MISSING_PROMPT"
        assert reason({"messages": [user("a")], "label": True}) == "LAST_TURN_NOT_ASSISTANT"


class TestOtherTrainers:
    def test_alpaca_joins_input_and_keeps_history_and_system(self):
        row = {
            "instruction": "Now translate:",
            "input": "Hallo",
            "system": "Be brief.",
            "history": [["Hi", "Hello"], ["Can you translate?", "Yes."]],
            "chosen": "Hello",
            "rejected": "Bye",
        }
        turns = system("Be brief."), user("Hi"), answer("Hello"), user("Can you translate?"), answer("Yes.")
        assert said(read(row)) == ((*turns, user("Now translate:\nHallo")), ("Hello", "Bye"))
        assert reason({**row, "history": [["Hi"]]}) == "WRONG_TYPE"

    def test_sharegpt_maps_roles_calls_and_tools(self):
        row = {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Weather in Ghent?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ghent"}}'},
                {"from": "observation", "value": "rain"},
            ],
            "chosen": {"from": "gpt", "value": "Rain."},
            "rejected": {"from": "gpt", "value": "Sun."},
            "system": "Be brief.",
            "tools": '[{"name": "weather", "description": "Tell it.", "parameters": {"type": "object"}}]',
        }
        group = read(row)
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ghent"}}}
        assert group.prompt == (
            system("Be brief."),
            user("Weather in Ghent?"),
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "rain"},
        )
        assert group.completions == ("Rain.", "Sun.")
        assert group.tools == ({"type": "function", "function": json.loads(row["tools"])[0]},)

    def test_completion_that_calls_a_function_stays_a_message(self):
        row = published_row("llama_factory_sharegpt")
        row["chosen"] = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
        (first, second) = read(row).completions
        assert first == {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
        }
        assert second == REJECTED
        row["chosen"]["value"] = "f()"
        assert reason(row) == "BAD_MESSAGE"

    def test_axolotl_takes_system_and_question(self):
        row = {**published_row("axolotl_intel"), "system": "Be brief."}
        assert said(read(row))[0] == (system("Be brief."), user(PROMPT))

    def test_nemo_keeps_the_turns_of_the_context(self):
        row = {**published_row("nemo_rl"), "context": [user("a"), answer("b"), user("c")]}
        assert read(row).prompt == (user("a"), answer("b"), user("c"))


@pytest.mark.parametrize("row", [{}, {"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": [user("a")]}])
def test_row_without_a_preference(row: dict[str, Any]):
    assert reason(row) == "UNKNOWN_FORMAT"


@pytest.mark.parametrize("name", FORMATS)
def test_row_out_of_a_table_is_the_same(name: str):
    """Arrow gives each object the fields of all, null where it has none."""
    row = published_row(name)
    (again,) = pa.Table.from_pylist([row]).to_pylist()
    assert read(again) == read(row)


NAMED = sorted(
    {column for name in FORMATS for column in published_row(name)} | {"kto_tag", "tools", "history", "ranks"}
)
KEYS = ("role", "content", "from", "value", "tool_calls", "response", "answer", "rank", "completion", "overall_score")
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a", "user", "gpt", "[{}]", "\ud800"])
)
VALUES = st.recursive(
    SCALARS | st.sampled_from([[user("a")], [user("a"), answer("b")], answer("c"), {"from": "human", "value": "a"}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMED), VALUES, max_size=8), st.sampled_from(["auto", *set(FORMATS.values())]))
def test_whatever_a_row_holds_it_is_read_or_rejected(row: dict[str, Any], row_format: str):
    for criteria in ({}, {"overall_score": 1.0}):
        try:
            group = paired(read(row, row_format, criteria), PairingConfig(ties="keep"))
        except Rejected:
            continue
        assert len(group.completions) == len(group.scores)
        assert all(c.strip() if isinstance(c, str) else c["role"] == "assistant" for c in group.completions)
        assert bool(group.chosen) == (len(group.completions) > 1)


def test_of_equal_completions_in_a_list_the_first_counts():
    row = {"prompt": "p", "completions": ["yes", "yes", "no"], "scores": [3, 1, 2]}
    group = text_group(row, "auto", Columns(), {})
    assert (group.completions, group.scores) == (("yes", "no"), (3.0, 2.0))
