"""Offline checks of a manifest against the schemas of KubeRay and Kubernetes. They are as strict as the API server."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError

Json = dict[str, Any]

SCHEMAS = {
    ("ray.io/v1", "RayJob"): "rayjobs.json",
    ("ray.io/v1", "RayCluster"): "rayclusters.json",
    ("v1", "ServiceAccount"): "companions.json",
    ("v1", "ConfigMap"): "companions.json",
    ("v1", "PersistentVolumeClaim"): "companions.json",
    ("networking.k8s.io/v1", "NetworkPolicy"): "companions.json",
    ("monitoring.coreos.com/v1", "PodMonitor"): "companions.json",
}
INTEGERS = {"int32": 2**31, "int64": 2**63}


class Violation(NamedTuple):
    """One fault in a manifest: the field, and what is wrong with it."""

    field: str
    what: str


def schema_violations(manifest: Json) -> list[Violation]:
    """List every field of a manifest that is not in the schema, has a wrong value, or is missing."""
    kind = (manifest.get("apiVersion"), manifest.get("kind"))
    if kind not in SCHEMAS:
        known = ", ".join(f"{k} ({version})" for version, k in SCHEMAS)
        return [Violation("kind", f"{kind[1]!r} of {kind[0]!r} is not supported; supported: {known}")]
    return [finding for error in _validator(*kind).iter_errors(manifest) for finding in _findings(error)]


def _findings(error: ValidationError) -> Iterator[Violation]:
    path = field_path(list(error.absolute_path))
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {}) if isinstance(error.schema, dict) else {}
        for key in sorted(set(error.instance) - set(known)):
            yield Violation(f"{path}.{key}".lstrip("."), "unknown field")
    elif error.validator == "required" and isinstance(error.instance, dict):
        needed = error.validator_value if isinstance(error.validator_value, list) else []
        missing = [key for key in needed if key not in error.instance]
        # The library reports one error for each missing key; its message begins with that key.
        for key in [key for key in missing if error.message.startswith(repr(key))]:
            yield Violation(f"{path}.{key}".lstrip("."), "is required, but missing")
    elif error.validator == "anyOf":
        yield Violation(path, f"{error.instance!r} is neither a whole number nor text")
    else:
        yield Violation(path or "(root)", error.message[:200])


def field_path(parts: list[str | int]) -> str:
    """Return the path of a field as text, such as `spec.workerGroupSpecs[0].replicas`."""
    written = ""
    for part in parts:
        written += f"[{part}]" if isinstance(part, int) else f".{part}"
    return written.lstrip(".")


@functools.cache
def _validator(version: str, kind: str) -> Draft7Validator:
    file = resources.files("dpo_ray.deploy.kubernetes").joinpath("crds", SCHEMAS[version, kind])
    schema = json.loads(file.read_text(encoding="utf-8"))
    common = json.loads(
        resources.files("dpo_ray.deploy.kubernetes").joinpath("crds", "companions.json").read_text("utf-8")
    )
    if SCHEMAS[version, kind] == "companions.json":
        schema = {**schema["kinds"][kind], "definitions": schema["definitions"]}
    else:
        _strict(schema)  # before `metadata` is set, which the vendor's schema leaves open
        schema["properties"]["metadata"] = {"$ref": "#/definitions/metadata"}
        schema["definitions"] = common["definitions"]
        schema["properties"].pop("status", None)
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return Draft7Validator(schema)


def _strict(schema: Any) -> None:
    """Change a structural schema of Kubernetes, in place, into a JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        for part in schema:
            _strict(part)
        return
    if not isinstance(schema, dict):
        return
    if schema.pop("x-kubernetes-int-or-string", False) is True:
        for key in ("type", "pattern"):
            schema.pop(key, None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    kind = schema.get("type")
    if schema.pop("nullable", False) is True and isinstance(kind, str):
        schema["type"] = [kind, "null"]
    limit = INTEGERS.get(schema.get("format", "")) if kind == "integer" else None
    if limit is not None:
        schema.setdefault("minimum", -limit)
        schema.setdefault("maximum", limit - 1)
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields") is True
    properties = schema.get("properties")
    if isinstance(properties, dict) and "required" in schema:  # the API server fills in defaults before it checks
        schema["required"] = [key for key in schema["required"] if "default" not in properties.get(key, {})]
    if kind == "object" and isinstance(properties, dict) and not open_ended:
        schema["additionalProperties"] = False
    for key, value in list(schema.items()):
        if key == "properties" and isinstance(value, dict):
            for part in value.values():  # a field may have the name of a keyword of JSON Schema
                _strict(part)
        elif key not in ("enum", "default", "required"):
            _strict(value)
