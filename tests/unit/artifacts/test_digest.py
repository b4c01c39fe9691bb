from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpo_ray.artifacts.digest import artifact_key, canonical_json, digest, file_sha256

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))
configs = st.dictionaries(text, values, min_size=1, max_size=4)
inputs = st.dictionaries(text, text, max_size=3)


def _shuffled(value, order):
    if isinstance(value, dict):
        items = list(value.items())
        order.shuffle(items)
        return {key: _shuffled(item, order) for key, item in items}
    return [_shuffled(item, order) for item in value] if isinstance(value, list) else value


def _paths(value, path=()):
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            yield from _paths(item, (*path, key))
    else:
        yield path


def _replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copy


@settings(max_examples=150, deadline=None)
@given(configs, inputs, st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(config, roles, order) -> None:
    key = artifact_key("tokens", 1, config, roles)
    assert artifact_key("tokens", 1, _shuffled(config, order), _shuffled(roles, order)) == key
    assert len(key) == 20
    assert int(key, 16) >= 0


@settings(max_examples=150, deadline=None)
@given(configs, inputs, leaves, st.data())
def test_a_change_of_any_leaf_changes_the_key(config, roles, leaf, data) -> None:
    path = data.draw(st.sampled_from(list(_paths(config))))
    changed = _replaced(config, path, leaf)
    assume(json.dumps(changed, sort_keys=True) != json.dumps(config, sort_keys=True))
    assert artifact_key("tokens", 1, changed, roles) != artifact_key("tokens", 1, config, roles)


@settings(max_examples=100, deadline=None)
@given(configs, inputs)
def test_every_part_of_the_key_counts(config, roles) -> None:
    keys = {
        artifact_key("tokens", 1, config, roles),
        artifact_key("token", 1, config, roles),
        artifact_key("tokens", 2, config, roles),
        artifact_key("tokens", 1, {"": config}, roles),
        artifact_key("tokens", 1, config, {**roles, "more than six": "x"}),
    }
    assert len(keys) == 5


@settings(max_examples=150, deadline=None)
@given(text, text, text, text)
def test_neighbours_never_run_together(a, b, c, d) -> None:
    assume((a, b) != (c, d))
    assert artifact_key("s", 1, {"x": [a, b]}, {}) != artifact_key("s", 1, {"x": [c, d]}, {})
    assert artifact_key("s", 1, {}, {a: b}) != artifact_key("s", 1, {}, {c: d})
    assert artifact_key("s" + a, 1, {"x": b}, {}) != artifact_key("s" + c, 1, {"x": d}, {})


@settings(max_examples=150, deadline=None)
@given(values)
def test_canonical_json_is_json_and_its_own_canonical_form(value) -> None:
    written = canonical_json(value)
    assert canonical_json(json.loads(written)) == written


def test_like_values_of_other_types_differ() -> None:
    assert len({digest(value) for value in (1, 1.0, True, "1", [1], {"1": 1}, None, "")}) == 8
    assert digest((1, 2)) == digest([1, 2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")], {"a": {"b": float("nan")}}, "\ud800"])
def test_what_json_cannot_hold_is_refused(value) -> None:
    with pytest.raises(ValueError, match=r"JSON|surrogates"):
        canonical_json(value)


@pytest.mark.parametrize("value", [{1: "a"}, {"a": [{None: 1}]}, {"a": {1, 2}}, b"bytes", Path("x")])
def test_other_keys_and_types_are_refused(value) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_known_digests(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'.encode()
