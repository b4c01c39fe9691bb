"""Turn pydantic's errors into readable lines: the path of the field, what is wrong, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, Tag

from .roles import MOVED_KEYS

SHOWN_CHARACTERS = 80
_KINDS = {  # pydantic's type of error -> what is expected, in terms of YAML
    "model_type": "a section (a mapping of keys) is expected",
    "model_attributes_type": "a section (a mapping of keys) is expected",
    "tuple_type": "a list is expected",
    "string_type": "text is expected (quote it)",
    "int_type": "a whole number is expected",
    "int_parsing": "a whole number is expected",
    "int_from_float": "a whole number is expected",
    "float_type": "a number is expected",
    "float_parsing": "a number is expected",
    "bool_type": "true or false is expected",
    "bool_parsing": "true or false is expected",
}


def explain_all(root: type[BaseModel], problems: Iterable[Any]) -> list[str]:
    """Return one line for each wrong field in `ValidationError.errors()`.

    If a field allows several types, pydantic reports one error for each type; only the first error is explained.
    """
    lines: dict[str, str] = {}
    for problem in problems:
        line = explain(root, problem)
        lines.setdefault(line.partition(": ")[0], line)
    return list(lines.values())


def explain(root: type[BaseModel], problem: Any) -> str:
    """Return one entry of `ValidationError.errors()` as `path: what is wrong; what is allowed; got VALUE`."""
    model, path = _walk(root, problem["loc"])
    value, kind, place = problem["input"], problem["type"], ".".join(path)
    if kind == "extra_forbidden" and place in MOVED_KEYS:
        return f"{place}: unknown key; set `{MOVED_KEYS[place]}` instead"
    if kind == "extra_forbidden":
        return f"{place}: unknown key; {_hint(root, model, path)}"
    if kind == "missing":
        return f"{place}: is required, but missing"
    if kind == "union_tag_invalid":
        return f"{place}.type: {value.get('type')!r} is not known; allowed: {problem['ctx']['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{place}.type: is required, but missing"
    if kind == "field_error":  # raised by a section's own validator
        return f"{'.'.join([*path, problem['ctx']['field']])}: {problem['msg']}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{place}: {message}" if path else message
    text = _KINDS.get(kind, f"{message[0].lower()}{message[1:]}")
    shown = repr(value) if len(repr(value)) <= SHOWN_CHARACTERS else repr(value)[: SHOWN_CHARACTERS - 3] + "..."
    return f"{place}: {text}; got {'nothing' if value is None else shown}"


def _hint(root: type[BaseModel], model: type[BaseModel] | None, path: list[str]) -> str:
    """Return a hint for an unknown key, which is the last part of `path`.

    The hint is a similar key of the section. If there is none, it is a field with the same name in another section. If
    there is none either, it lists all keys of the section.
    """
    key, section = path[-1], ".".join(path[:-1]) or "the recipe"
    known = sorted(model.model_fields) if model else []
    elsewhere = next((p for p in _field_paths(root) if p.rpartition(".")[2] == key), None)
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.6 if elsewhere is None else 0.9):
        return f"did you mean `{near[0]}`?"
    if elsewhere is not None:
        return f"did you mean `{elsewhere}`?"
    return f"{section} has: {', '.join(known)}"


def _field_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the paths of all fields of a recipe. The fields of a section follow the section itself."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for below in _models_in(field.annotation):
            yield from _field_paths(below, f"{prefix}{name}.")


class _Kind(NamedTuple):
    """One of the types that a value may have, and the tag by which pydantic names this type in an error's location."""

    tag: str
    type: Any


def _walk(root: type[BaseModel], loc: tuple[Any, ...]) -> tuple[type[BaseModel] | None, list[str]]:
    """Follow pydantic's location of an error; return the model of the innermost section, and the path in the recipe.

    The location also contains tags of types. The path leaves them out, because they are not keys of the recipe.
    """
    owner: type[BaseModel] | None = root
    kinds, path, chosen = [_Kind("", root)], [], None
    for part in loc:
        models = [kind.type for kind in kinds if _is_model(kind.type)]
        values = [get_args(kind.type)[1] for kind in kinds if get_origin(kind.type) is dict]
        is_field = part == chosen and bool(models) and part in models[0].model_fields  # it may have the name of a type
        if (tagged := [kind for kind in kinds if kind.tag == part]) and not is_field:
            kinds, chosen = tagged, part
        elif isinstance(part, int):
            path.append(str(part))
            items = [item for kind in kinds if get_origin(kind.type) is tuple for item in get_args(kind.type)]
            kinds = [kind for item in items if item is not Ellipsis for kind in _kinds(item)]
        elif models:
            owner, field = models[0], models[0].model_fields.get(part)
            path.append(part)
            kinds = _kinds(field.annotation) if field else []
        elif values and part != "[key]":
            owner = None
            path.append(part)
            kinds = _kinds(values[0])
        elif not kinds:
            path.append(part)
    return owner, path


def _kinds(annotation: Any) -> list[_Kind]:
    """List the types that an annotation allows, with their tags. The tag of a section is its field `type`."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        tag = next((m.tag for m in metadata if isinstance(m, Tag)), "")
        return [_Kind(tag or kind.tag, kind.type) for kind in _kinds(inner)]
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    field = annotation.model_fields.get("type") if _is_model(annotation) else None
    return [_Kind(next(iter(get_args(field.annotation)), "") if field else "", annotation)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if _is_model(annotation):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
