"""Loads a recipe: reads its YAML, applies `key.path=value` overrides, and validates the result."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dpo_ray.errors import ConfigError

from .explain import explain_all
from .recipe import Recipe

MAX_RECIPE_BYTES = 1 << 20
MOST_DIGITS = 40


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys, because they are ambiguous, and aliases, because they can make a small
    file expand hugely."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed in a recipe", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_int(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    if len(text) > MOST_DIGITS:
        what = f"a number of {len(text):,} digits cannot be a value"
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
    return int(text, 16 if text.startswith("0x") else 8 if text.startswith("0o") else 10)


def _construct_text(loader: _StrictLoader, node: yaml.ScalarNode) -> str:
    """Return the text of a YAML node. Refuse NUL and lone surrogates, which no file, name or model can contain."""
    text = str(loader.construct_scalar(node))
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
        what = "the text contains NUL or a lone surrogate, which nothing accepts"
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
    return text


# Numbers follow YAML 1.2's core schema (10.3.2). PyYAML follows YAML 1.1, which reads `5e-7` as text, `010` as 8, and
# `190:20:30` as 685,230.
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    _INT, re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_StrictLoader.add_constructor(_INT, _construct_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:str", _construct_text)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506, TID251 - a SafeLoader; the only place that reads YAML
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        fix = "quote text that begins with * or &" if "alias" in what or "alphabetic" in what else "correct the line"
        raise ConfigError(f"not valid YAML: {what}", where=place, fix=fix) from None
    except RecursionError:
        raise ConfigError(
            "the YAML is nested too deeply",
            where=where,
            fix="a recipe is a short file: check that this is not a data file",
        ) from None
    except ValueError as error:  # raised by YAML's constructors: an invalid date, a number of thousands of digits
        raise ConfigError(
            f"a value cannot be read: {error}", where=where, fix="quote the value if it is text"
        ) from None


def read_recipe_values(path: Path) -> dict[str, Any]:
    """Read a recipe file; return its values as a mapping that is not validated yet.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, not YAML, not a mapping, or has a repeated key.
    """
    where = str(path)
    values = _parse_yaml(_read_text(path, where), where)
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"a recipe must be a mapping of sections, but this file is {kind}",
            where=where,
            fix="start with `name:`, `model:`, `data:`",
        )
    return values


def _read_text(path: Path, where: str) -> str:
    if not os.path.exists(path):
        raise ConfigError(
            "there is no such recipe", where=where, fix="`dpo-ray init RECIPE` writes a commented recipe to start with"
        )
    if path.is_dir():
        raise ConfigError("this path is a directory, not a recipe", where=where, fix="name a YAML file")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise ConfigError(
            f"the file is larger than {MAX_RECIPE_BYTES} bytes",
            where=where,
            fix="a recipe is a short file: check that this is not a data file",
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the file is not UTF-8 text (byte {error.start})", where=where, fix="save the file as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the file cannot be read: {error.strerror}", where=where, fix="check its permissions"
        ) from None


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of `values` with the overrides `key.path=value` applied in order; each value is read as YAML.

    Raises:
        ConfigError: an override has no `=` or an empty key, its value is not YAML, or its path leads through a value
            that is not a section.
    """
    result = _copy_mappings(values)
    for override in overrides:
        key, sign, text = override.partition("=")
        parts = key.strip().split(".")
        if not sign or not all(parts):
            raise ConfigError(
                f"`{override}` is not KEY.PATH=VALUE",
                where="command line",
                fix="write for example train.objective.beta=0.1",
            )
        section = result
        for depth, part in enumerate(parts[:-1]):
            if section.get(part) is None:  # the section is missing or empty
                section[part] = {}
            below = section[part]
            if not isinstance(below, dict):
                place = ".".join(parts[: depth + 1])
                raise ConfigError(
                    f"`{place}` is {below!r}, not a section",
                    where=f"command line, {key}",
                    fix=f"set {place}=VALUE itself",
                )
            section = below
        section[parts[-1]] = _parse_yaml(text, f"command line, {key}")
    return result


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a recipe, apply the overrides `key.path=value`, and validate the result.

    Raises:
        ConfigError: the file cannot be read, or fields are wrong. The message lists each wrong field with its path, its
            value, and what is allowed.
    """
    return validate_recipe(apply_overrides(read_recipe_values(path), overrides), where=str(path))


def validate_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Build a Recipe from plain values. `where` names the source of the values in the message of an error.

    Raises:
        ConfigError: fields are wrong.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = explain_all(Recipe, error.errors(include_url=False))
        many = f"{len(lines)} fields are wrong:\n    " + "\n    ".join(lines)
        raise ConfigError(
            lines[0] if len(lines) == 1 else many, where=where, fix="`dpo-ray schema` lists every field"
        ) from None


def _copy_mappings(value: Any) -> Any:
    return {k: _copy_mappings(v) for k, v in value.items()} if isinstance(value, dict) else value
