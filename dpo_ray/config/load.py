"""Read a recipe: YAML, then `key.path=value` overrides, then validation with errors that a person can act on."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dpo_ray.errors import ConfigError

from .recipe import Recipe

MAX_RECIPE_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """Refuse what makes a recipe ambiguous or a bomb: repeated keys, and aliases altogether."""

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
                    None, None, f"the key `{key}` stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads `5e-7` as text; numbers in recipes follow YAML 1.2.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506, TID251 - a SafeLoader, and the one place that reads YAML
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"not valid YAML: {what}", where=place, fix="correct the line") from None


def read_recipe_values(path: Path) -> dict[str, Any]:
    """Read the mapping that a recipe file holds.

    Raises:
        ConfigError: no such file, too large, not UTF-8, not YAML, a repeated key, or not a mapping.
    """
    where = str(path)
    if not path.exists():
        raise ConfigError(
            "no such recipe", where=where, fix="`dpo-ray init RECIPE` writes a commented one to begin with"
        )
    if path.is_dir():
        raise ConfigError("this is a directory, not a recipe", where=where, fix="name the YAML file in it")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise ConfigError(
            f"larger than {MAX_RECIPE_BYTES} bytes", where=where, fix="a recipe is a page of YAML; is this data?"
        )
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"), where)
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text (byte {error.start})", where=where, fix="save the file as UTF-8") from None
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"a recipe is a mapping of sections, this is {kind}",
            where=where,
            fix="begin with `name:`, `model:`, `data:`",
        )
    return values


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set `key.path=value` pairs (the value is YAML) in a copy of `values`; the last one wins.

    Raises:
        ConfigError: an override without `=`, with an empty key, or that goes through something that is no section.
    """
    result = _copy_mappings(values)
    for override in overrides:
        key, sign, text = override.partition("=")
        parts = key.strip().split(".")
        if not sign or not all(parts):
            raise ConfigError(
                f"`{override}` is not KEY.PATH=VALUE", where="command line", fix="for example train.objective.beta=0.1"
            )
        section = result
        for depth, part in enumerate(parts[:-1]):
            below = section.setdefault(part, {})
            if not isinstance(below, dict):
                place = ".".join(parts[: depth + 1])
                raise ConfigError(
                    f"`{place}` is {below!r}, not a section",
                    where=f"command line, {key}",
                    fix=f"set {place}=... as a whole",
                )
            section = below
        section[parts[-1]] = _parse_yaml(text, f"command line, {key}")
    return result


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read, override and validate a recipe.

    Raises:
        ConfigError: with every wrong field: its path, its value, and what is allowed.
    """
    return validate_recipe(apply_overrides(read_recipe_values(path), overrides), where=str(path))


def validate_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Make a Recipe of plain values; see `load_recipe`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors(include_url=False)]
        many = f"{len(lines)} fields are wrong:\n    " + "\n    ".join(lines)
        raise ConfigError(
            lines[0] if len(lines) == 1 else many, where=where, fix="`dpo-ray schema` lists every field"
        ) from None


def _explain(problem: Any) -> str:
    """Turn one of pydantic's errors into `path: what is wrong (value); what is allowed`."""
    model, path = _walk(problem["loc"])
    value, kind = problem["input"], problem["type"]
    if kind == "extra_forbidden":
        key, section = path[-1], ".".join(path[:-1]) or "the recipe"
        known = sorted(model.model_fields) if model else []
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"{section} has: {', '.join(known)}"
        return f"{'.'.join(path)}: unknown key; {hint}"
    if kind == "missing":
        return f"{'.'.join(path)}: required, and not given"
    if kind == "union_tag_invalid":
        return f"{'.'.join(path)}.type: {value.get('type')!r} is not known; allowed: {problem['ctx']['expected_tags']}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{'.'.join(path)}: {message}" if path else message
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    return f"{'.'.join(path)}: {message[0].lower()}{message[1:]}; got {shown}"


def _walk(loc: tuple[Any, ...]) -> tuple[type[BaseModel] | None, list[str]]:
    """Follow a pydantic error location; drop the union tags, which are no keys; return the last section's model."""
    models: list[Any] = [Recipe]
    path: list[str] = []
    owner: type[BaseModel] | None = Recipe
    for part in loc:
        tagged = [m for m in models if isinstance(m, type) and _tag(m) == part]
        if tagged:
            models = tagged
            owner = tagged[0]
            continue
        path.append(str(part))
        owner = next((m for m in models if _is_model(m)), owner)
        field = owner.model_fields.get(part) if owner and isinstance(part, str) else None
        if field is not None:
            models = _models_in(field.annotation)
    owner = (
        next((m for m in models if _is_model(m) and path and path[-1] not in m.model_fields), owner)
        if len(path) > 1
        else owner
    )
    return owner, path


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _tag(kind: type) -> str | None:
    field = kind.model_fields.get("type") if _is_model(kind) else None  # type: ignore[attr-defined]
    return get_args(field.annotation)[0] if field and get_args(field.annotation) else None


def _models_in(annotation: Any) -> list[Any]:
    if _is_model(annotation):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _copy_mappings(value: Any) -> Any:
    return {k: _copy_mappings(v) for k, v in value.items()} if isinstance(value, dict) else value
