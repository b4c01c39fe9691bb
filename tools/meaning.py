"""Show that a rearrangement changed nothing in meaning: collect what a checkout means, and compare two of them.

    python tools/meaning.py collect BEFORE.json          # in the old checkout, with its environment; some five minutes
    python tools/meaning.py collect AFTER.json           # in the new one
    python tools/meaning.py compare BEFORE.json AFTER.json

Collected are the JSON schema without its descriptions, the commands with their options, and of the quickstart and the online
quickstart every artifact: its key, its inputs, its rows, its figures and the digests of its files, without what holds times.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPES = ("pipelines/quickstart.yaml", "pipelines/quickstart_online.yaml")
TIMED_FILES = re.compile(r"metrics\.jsonl$|README\.md$|report\.html$")
TIMED_FIGURES = re.compile(r"seconds|memory|gib|per_second|tokens_cached|cached|engine|usage|throughput|mfu|flops")
HELP = """
import json, typer.main, click
from {app} import app
def tree(command):
    params = [[p.name, sorted(p.opts), p.required, str(p.default)] for p in command.params if p.name != "help"]
    children = getattr(command, "commands", {{}})
    return {{"params": sorted(params), "commands": {{name: tree(child) for name, child in sorted(children.items())}}}}
print(json.dumps(tree(typer.main.get_command(app))))
"""


def collect(target: Path) -> None:
    """Run what is compared in the checkout that is the working directory, and write it as JSON."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}

    def output(*arguments: str) -> str:
        done = subprocess.run(  # noqa: S603
            [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    app = "dpo_ray.cli.app" if Path("dpo_ray/cli").is_dir() else "dpo_ray.cli"
    meaning: dict[str, Any] = {
        "schema": _without_descriptions(json.loads(output("-m", "dpo_ray", "schema"))),
        "commands": json.loads(output("-c", HELP.format(app=app))),
    }
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory(prefix="meaning-") as place:
            output("-m", "dpo_ray", "run", recipe, f"output={place}")
            meaning[recipe] = {
                name: value for path in Path(place).rglob("manifest.json") for name, value in [_artifact(path)]
            }
    target.write_text(json.dumps(meaning, indent=1, sort_keys=True))


def _without_descriptions(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {
            k: _without_descriptions(v) for k, v in schema.items() if not (k == "description" and isinstance(v, str))
        }
    return [_without_descriptions(v) for v in schema] if isinstance(schema, list) else schema


def _artifact(path: Path) -> tuple[str, Any]:
    manifest = json.loads(path.read_text())
    files = {f["name"]: f["sha256"] for f in manifest["files"] if not TIMED_FILES.search(f["name"])}
    kept = {name: manifest[name] for name in ("inputs", "rows", "config")}
    return f"{manifest['stage']}-{manifest['key']}", {**kept, "files": files, "figures": _untimed(manifest["figures"])}


def _untimed(figures: Any) -> Any:
    if isinstance(figures, dict):
        return {k: _untimed(v) for k, v in figures.items() if not TIMED_FIGURES.search(k)}
    return [_untimed(v) for v in figures] if isinstance(figures, list) else figures


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """List the values that differ, each by its path."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [d for k in sorted({*before, *after}) for d in differences(before.get(k), after.get(k), f"{path}/{k}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            d for i, (b, a) in enumerate(zip(before, after, strict=True)) for d in differences(b, a, f"{path}[{i}]")
        ]
    return [] if before == after else [f"{path}: {str(before)[:100]} -> {str(after)[:100]}"]


def main(command: str, *paths: str) -> None:
    if command == "collect":
        collect(Path(paths[0]))
        return
    found = differences(*(json.loads(Path(path).read_text()) for path in paths))
    print("\n".join(found) or "the same")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
