"""The directory that is uploaded to the cluster with a job: the recipe, its chat template and the user's code.

Data is never uploaded.
"""

from __future__ import annotations

import posixpath
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from ray._private.thirdparty.pathspec.pathspec import PathSpec  # Ray's own uploads use it for ignore files

from dpo_ray.config.data import names_no_file
from dpo_ray.config.load import validate_recipe
from dpo_ray.config.model import is_hub_name
from dpo_ray.config.recipe import Recipe
from dpo_ray.deploy.shared_paths import named_places
from dpo_ray.errors import ConfigError
from dpo_ray.observe import text

RECIPE_FILE = "recipe.yaml"
TEMPLATE_FILE = "chat_template.jinja"
MAX_BYTES = 20 << 20  # the head keeps the upload in memory and sends it to every node
NAMED_IN_REFUSALS = 3
IGNORE_FILES = (".gitignore", ".rayignore")
NOT_CODE = (".git", ".venv", "venv", "__pycache__", ".ray")
SECRETS = (
    *(".env*", "*.env", ".netrc", ".aws", ".ssh", ".kube", "kubeconfig*", ".docker", ".config", ".azure", ".gnupg"),
    *(".pypirc", ".npmrc", ".pgpass", ".my.cnf", ".huggingface", ".cache", ".git-credentials", ".*_history"),
    *(".history", "*.tfstate", "*.tfvars", ".vault*"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.asc", "*.gpg", "id_rsa*", "id_ed25519*"),
    *("id_ecdsa*", "id_dsa*", "*credential*", "*secret*", "*password*", "*service*account*", "*.token", "token"),
    *("token.*", "*_token", "*_token.*", "*apikey*", "*api_key*", "adc.json"),
)
"""Names of files and directories that may hold secrets, in upper or lower case. They are never uploaded."""

CODE_SUFFIXES = (".py", ".pyi", ".jinja", ".j2")
"""Files with these endings are code. They are uploaded even if their names match SECRETS, such as `secret_santa.py`."""


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML text, with all overrides, as the driver on the cluster will read it.

    Raises:
        ConfigError: the recipe contains a path that only this machine can access.
    """
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True, exclude={"cluster": {"kubernetes"}})
    values.setdefault("output", recipe.output)
    for section, key, field in named_places(values):
        may_be_hub_name = key == "path" and section.get("type") != "files"
        for path in section[key] if isinstance(section[key], list) else [section[key]]:
            _check_seen_by_all(str(path), field, may_be_hub_name)
    if _template(recipe) is not None:
        values["data"]["chat_template"] = TEMPLATE_FILE
    values["ray"] = {"address": "auto"}
    validate_recipe(values, where=f"{recipe.name} on the cluster")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def fill(target: Path, recipe: Recipe, code: Path | None) -> list[str]:
    """Copy all files to upload into `target`, and return their names.

    `code` is a directory with the user's own code, such as the function of a judge. Files that its .gitignore and
    .rayignore files name are left out. If it has a recipe.yaml, the submitted recipe replaces this file.

    Raises:
        ConfigError: the directory or the chat template is missing, the directory is too large, or the recipe contains a
            path that only this machine can access.
    """
    text, template = recipe_text(recipe), _template(recipe)
    if code is not None:
        for name in code_files(code):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(code / name, target / name)
    (target / RECIPE_FILE).write_text(text, encoding="utf-8")
    if template is not None:
        (target / TEMPLATE_FILE).write_text(_read(template), encoding="utf-8")
    return sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())


def code_files(directory: Path) -> list[str]:
    """List the files in a user's directory that will be uploaded, with paths relative to the directory.

    Raises:
        ConfigError: there is no such directory, or its files are larger than MAX_BYTES.
    """
    where = f"--working-dir {directory}"
    if not directory.is_dir():
        raise ConfigError("there is no such directory", where=where, fix="use the directory that holds your own code")
    sizes = {file: (directory / file).stat().st_size for file in _walk(directory, "", [])}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(_by_entry(sizes).items(), key=lambda item: -item[1])[:NAMED_IN_REFUSALS]
        named = ", ".join(f"{entry} ({text.size(bytes_)})" for entry, bytes_ in largest)
        what = f"the upload would have {text.size(total)}, but the limit is {text.size(MAX_BYTES)}; the largest entries: {named}"
        fix = "add the largest entries to .rayignore in this directory; models and data belong on storage that all nodes can access"
        raise ConfigError(what, where=where, fix=fix)
    return sorted(sizes)


def _walk(root: Path, at: str, rules: list[tuple[str, PathSpec]]) -> Iterator[str]:
    """Yield the files below the directory `at`, except those that an ignore file excludes.

    An ignore file excludes files in its own directory and in the directories below it. Links to directories, and links
    to files outside of `root`, are skipped.
    """
    here = root / at
    for name in IGNORE_FILES:
        if (here / name).is_file():
            lines = _read(here / name).splitlines()
            rules = [*rules, (at, PathSpec.from_lines("gitwildmatch", lines))]
    for entry in sorted(here.iterdir()):
        path = posixpath.join(at, entry.name) if at else entry.name
        is_directory = entry.is_dir()
        if _is_never_sent(entry.name) or _ignored(path, is_directory, rules):
            continue
        if is_directory and not entry.is_symlink():
            yield from _walk(root, path, rules)
        elif entry.is_file() and entry.resolve().is_relative_to(
            root.resolve()
        ):  # a link must not lead out of the directory
            yield path


def _is_never_sent(name: str) -> bool:
    if name.lower().endswith(CODE_SUFFIXES):
        return False
    return any(fnmatchcase(name.lower(), pattern) for pattern in (*NOT_CODE, *IGNORE_FILES, *SECRETS))


def _ignored(path: str, is_directory: bool, rules: list[tuple[str, PathSpec]]) -> bool:
    end = "/" if is_directory else ""
    return any(spec.match_file(posixpath.relpath(path, at or ".") + end) for at, spec in rules)


def _by_entry(sizes: dict[str, int]) -> dict[str, int]:
    """Return the size of each file and the total size of each directory at the top level."""
    entries: dict[str, int] = {}
    for file, size in sizes.items():
        head, *below = file.split("/")
        entry = f"{head}/" if below else head
        entries[entry] = entries.get(entry, 0) + size
    return entries


def _check_seen_by_all(path: str, field: str, may_be_hub_name: bool) -> None:
    if "://" in path or path.startswith("builtin:") or posixpath.isabs(path):
        return
    if may_be_hub_name and is_hub_name(path):
        return
    example = f"{field}=/shared/{posixpath.basename(path.rstrip('/')) or 'runs'}"
    fix = f"use an absolute path that every node of the cluster can access, or a URI: {example}, or s3://bucket/..."
    raise ConfigError("a relative path has another meaning on the cluster", where=f"{field}={path}", fix=fix)


def _template(recipe: Recipe) -> Path | None:
    choice = recipe.data.chat_template
    return None if names_no_file(choice) else Path(choice)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the file cannot be read: {error}", where=str(path), fix="name a file of UTF-8 text"
        ) from None
