"""Random overrides of every field of a recipe, as the command line takes them: made from the schema of recipes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import yaml

from dpo_ray.config.recipe import Recipe

MOST_FIELDS = 4
SCHEMA: dict[str, Any] = Recipe.model_json_schema()

NUMBERS: list[Any] = [0, 1, 2, 3, 7, 64, -1, 0.5, 0.9, 1.5, -0.1, 1e-300, 1e300, 10**9, 2**53, 10**20, -(10**20)]
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    *(
        "",
        " ",
        "x",
        "0",
        "absent/path",
        "/absent/x.jsonl",
        "none/*.jsonl",
        "../x",
        "~absent_user/x",
        "org/name",
        "a" * 300,
    ),
    *("a\0b", "\x1b[31mred", "é\u202e", "\ud800", "file:///x", "s3:/x", "ftp://host/x", "builtin:", "builtin:gpt5"),
    *("tests", "/dev/null", "/proc/self/mem", "x\ny", "[bold]x", "http://[::1", "hub:", "name:x", "synthetic"),
]
RAW = [  # what is no value, or another one than it seems
    *(
        "190:20:30",
        "0b11",
        "010",
        "1_000",
        "1e999",
        "0x" + "f" * 100_000,
        "9" * 5_000,
        "[",
        "{a: ",
        "*x",
        "!!python/x y",
    ),
    *("2024-13-45", "2024-02-03", "yes", "~", "- x", "a: b", "'x", "\t", "[" * 200, "{a: 1, a: 2}", "null"),
]
SENSIBLE = {  # values that a pattern allows
    "function": [
        "dpo_ray.data.synthetic.true_rewards",
        "absent.module.f",
        "os.path.absent",
        "dpo_ray.data.synthetic.x",
    ],
    "base_url": ["http://127.0.0.1:9/v1", "https://[", "http://"],
    "filters": ["dpo_ray.data.synthetic:true_reward", "nowhere:keep", "os:path"],
    "path": ["builtin:sentiment_llama", "absent/model", "tests/corpus/rows.jsonl"],
    "extract": ["(x)", "x", "("],
    "api_key_env": ["DPO_RAY_TEST_NO_KEY", "HOME"],
    "chat_template": ["plain", "auto", "absent.jinja", "README.md"],
    "target_modules": [["q_proj"], ["lm_head"], ["wq"], [], [""], ["("]],
}


def random_overrides(chance: random.Random, *, online: bool) -> dict[str, str]:
    """Draw values for one to four fields: the YAML text of each, by its path. Half of the draws are of sensible values.

    Args:
        online: the recipe has a section `online`, whose fields can be set one by one.
    """
    fields = [path for path in FIELDS if online or not path.startswith("online.")]
    weights = [0.1 if path.startswith("cluster.kubernetes.") else 1.0 for path in fields]
    paths, sensible = chance.choices(fields, weights, k=chance.randint(1, MOST_FIELDS)), chance.random() < 0.5
    return {path: _text(FIELDS[path], path.rpartition(".")[2], chance, sensible) for path in paths}


def _fields(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path and the schema of every field that an override can name.

    Sections have a path, too. The fields of a section that may be of several types are drawn with it.
    """
    sections = [kind for kind in _kinds(node) if "properties" in kind]
    for name, below in sections[0]["properties"].items() if len(sections) == 1 or path == "train.objective." else ():
        yield f"{path}{name}", below
        yield from _fields(below, f"{path}{name}.")


def _kinds(node: dict[str, Any]) -> list[dict[str, Any]]:
    """List the schemas that a value may have."""
    if "$ref" in node:
        return _kinds(SCHEMA["$defs"][node["$ref"].rpartition("/")[2]])
    alternatives = node.get("anyOf") or node.get("oneOf")
    return [kind for one in alternatives for kind in _kinds(one)] if alternatives else [node]


FIELDS = dict(sorted(_fields(SCHEMA)))
TEXT_FIELDS = [
    path
    for path, node in FIELDS.items()
    if any(kind.get("type") == "string" and not {"enum", "const"} & kind.keys() for kind in _kinds(node))
    and not path.startswith("cluster.")
]


def as_yaml(value: Any) -> str:
    """Return a value as the YAML text of an override."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")


def _text(node: dict[str, Any], name: str, chance: random.Random, sensible: bool) -> str:
    if not sensible and chance.random() < 0.1:
        return chance.choice(RAW)
    return as_yaml(_value(node, name, chance, sensible))


def _value(node: dict[str, Any], name: str, chance: random.Random, sensible: bool) -> Any:
    """Draw a value that the schema allows or nearly allows; unless it is to be sensible, sometimes one of another type."""
    if not sensible and chance.random() < 0.15:
        return chance.choice([None, True, [], {}, "x", [None], {"x": 1}, *NUMBERS, *NOT_FINITE, *TEXTS])
    if name in SENSIBLE and chance.random() < 0.7:
        return chance.choice(SENSIBLE[name])
    kind = chance.choice(_kinds(node))
    if "enum" in kind:
        return chance.choice(kind["enum"])
    if "const" in kind:
        return kind["const"]
    match kind.get("type"):
        case "integer" | "number":
            return _sensible_number(kind, chance) if sensible else _number(kind, chance)
        case "boolean":
            return chance.random() < 0.5
        case "null":
            return None
        case "array":
            items = kind.get("prefixItems") or [kind["items"]] * chance.randint(0, 3)
            return [_value(item, name, chance, sensible) for item in items]
        case "object":
            return _section(kind, chance, sensible)
    own = kind.get("default", node.get("default", "x"))
    return own if sensible and chance.random() < 0.7 else chance.choice([own, *TEXTS])


def _sensible_number(kind: dict[str, Any], chance: random.Random) -> Any:
    low = kind.get("minimum", kind.get("exclusiveMinimum", 0))
    high = min(kind.get("maximum", kind.get("exclusiveMaximum", 64)), chance.choice([2, 64, 100_000]))
    return chance.randint(low + 1, max(low + 1, high)) if kind["type"] == "integer" else chance.uniform(low, high)


def _number(kind: dict[str, Any], chance: random.Random) -> Any:
    """Draw a number, often at a bound or just outside of it."""
    bounds = [kind[k] for k in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if k in kind]
    near = [bound + step for bound in bounds for step in (-1, -1e-9, 0, 1e-9, 1)]
    value = chance.choice(near) if near and chance.random() < 0.4 else chance.choice([*NUMBERS, *NOT_FINITE])
    whole = kind["type"] == "integer" and value == value and abs(value) < float("inf") and chance.random() < 0.8
    return int(value) if whole else value


def _section(kind: dict[str, Any], chance: random.Random, sensible: bool) -> dict[str, Any]:
    known = kind.get("properties", {})
    if not known:  # a mapping with names of its own
        values = [kind.get("additionalProperties"), *kind.get("patternProperties", {}).values()]
        inner = next((value for value in values if isinstance(value, dict)), {"type": "string"})
        names = ["x", "near"] if sensible else ["x", "near", "a/b", "FAR", "X", ""]
        return {chance.choice(names): _value(inner, "", chance, sensible) for _ in range(2)}
    wanted = [n for n in known if n in kind.get("required", []) or "const" in known[n] or chance.random() < 0.25]
    return {name: _value(known[name], name, chance, sensible) for name in wanted}
