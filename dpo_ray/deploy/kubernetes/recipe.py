"""The recipe as the driver on the cluster reads it: its paths are valid in every pod, and its resources are explicit."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

import yaml

from dpo_ray.config.data import names_no_file
from dpo_ray.config.load import validate_recipe
from dpo_ray.config.model import is_hub_name
from dpo_ray.config.recipe import Recipe
from dpo_ray.deploy.shared_paths import MADE_BY_THE_RUN, named_places
from dpo_ray.errors import ConfigError

from .groups import engine_labels, gpus, training_labels

RECIPE_DIRECTORY = "/etc/dpo-ray"
RECIPE_FILE = "recipe.yaml"
MAX_CONFIG_MAP_BYTES = 1 << 20  # the API server's limit for all keys together


def config_map_files(recipe: Recipe) -> dict[str, str]:
    """Return the files of a ConfigMap, by name: the recipe, and its chat template if that is a file.

    Raises:
        ConfigError: not all pods can access a path, the template cannot be read, the API key of a judge is in no Secret,
            or the files are too large.
    """
    values = _on_cluster(recipe)
    files = {}
    template = recipe.data.chat_template
    if not names_no_file(template):
        name = posixpath.basename(template)
        files[name] = _template_text(template)
        values["data"]["chat_template"] = f"{RECIPE_DIRECTORY}/{name}"
    validate_recipe(values, where=f"{recipe.name} on Kubernetes")
    files[RECIPE_FILE] = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if sum(len(text.encode()) for text in files.values()) > MAX_CONFIG_MAP_BYTES:
        raise ConfigError(
            "the recipe and the chat template are larger than 1 MiB",
            where=recipe.name,
            fix="remove data from these two files",
        )
    return files


def output_on_cluster(recipe: Recipe) -> str:
    """Return the recipe's output as every pod sees it.

    Raises:
        ConfigError: not all pods can access it.
    """
    storage = recipe.cluster.kubernetes.storage
    return path_in_pods(recipe.output, "output", storage.mount if storage is not None else None)


def secret_variables_missing(recipe: Recipe) -> list[str]:
    """List the environment variables that judges need but that are in no entry of cluster.kubernetes.secrets."""
    needed = recipe.online.judge_environment() if recipe.online is not None else set()
    return sorted(needed - {s.variable for s in recipe.cluster.kubernetes.secrets})


def _on_cluster(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values for the cluster: paths as pods see them, and explicit GPUs, node labels and address."""
    missing = secret_variables_missing(recipe)
    if missing:
        fix = f"add {{variable: {missing[0]}, secret: NAME, key: KEY}}"
        raise ConfigError(
            f"a judge needs the environment variable {missing[0]}", where="cluster.kubernetes.secrets", fix=fix
        )
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True, exclude={"cluster"})
    values.setdefault("output", recipe.output)
    storage = recipe.cluster.kubernetes.storage
    mount = storage.mount if storage is not None else None
    for section, key, field in list(named_places(values)):
        paths = section[key] if isinstance(section[key], list) else [section[key]]
        seen = [path_in_pods(path, field, mount) for path in paths]
        section[key] = seen if isinstance(section[key], list) else seen[0]
    values["ray"] = {"address": "auto"}
    values["cluster"] = {"roles": _roles_on_cluster(recipe)}
    return values


def _roles_on_cluster(recipe: Recipe) -> dict[str, Any]:
    """Return the section cluster.roles, with the GPUs and node labels of the pods on which workers of each role run."""
    roles: dict[str, Any] = recipe.cluster.roles.model_dump(mode="json", exclude_unset=True)
    labels, each = engine_labels(recipe), gpus(recipe)
    engine = {"gpus": each.engine} | ({"node_labels": labels} if labels else {})
    worker = {"gpus": each.train, "node_labels": training_labels(recipe)}
    return roles | {"reference": roles.get("reference", {}) | engine, "train": roles.get("train", {}) | worker}


def path_in_pods(path: str, field: str, mount: str | None) -> str:
    """Return the path by which every pod can access a file or directory. A relative path is on the shared volume.

    Raises:
        ConfigError: the path is not on the shared volume, or the pods have no shared volume.
    """
    if "://" in path or path.startswith("builtin:"):
        return path
    if field not in MADE_BY_THE_RUN and (posixpath.isabs(path) or _is_hub_model(path, field)):
        return path  # it is on the volume, in the image or on the hub
    if mount is None:
        fix = f"set {field}=s3://bucket/prefix or gs://bucket/prefix, or set cluster.kubernetes.storage"
        raise ConfigError(
            "the pods have no shared volume, and this path is not in an object store", where=f"{field}={path}", fix=fix
        )
    place = posixpath.normpath(posixpath.join(mount, path))
    if place != mount and not place.startswith(f"{mount}/"):
        fix = f"use a directory in {mount}, or set cluster.kubernetes.storage.mount"
        raise ConfigError("this path is not on the shared volume of the pods", where=f"{field}={path}", fix=fix)
    return place


def _is_hub_model(path: str, field: str) -> bool:
    if field.startswith("data.") or field.endswith("adapter"):
        return False
    return is_hub_name(path)


def _template_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template cannot be read: {error}",
            where=f"data.chat_template={path}",
            fix="set auto, plain, or the path of a file",
        ) from None
