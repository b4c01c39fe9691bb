"""The shape of the package: what the root holds, how long modules and functions are, no cycles, how docstrings begin."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[3] / "dpo_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))
BESIDE = sorted(p for folder in ("tests", "tools", "benchmarks") for p in (PACKAGE.parent / folder).rglob("*.py"))
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 450, 70
UNCLEAR_VERBS = {"Say", "Give", "Have", "Let", "See", "Tell"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of the package that one imports, anywhere in it."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            source = base if node.level else node.module or ""
            targets |= {f"{source}.{a.name}" if f"{source}.{a.name}" in modules else source for a in node.names}
        elif isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
    return (targets & modules) - {name_of(path)}


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return the names of one cycle; empty where there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        for target in sorted(edges.get(node, ())):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := visit(node, []))), [])


def test_the_root_holds_three_files_and_folders() -> None:
    assert {p.name for p in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}


def test_modules_and_functions_fit_on_screens() -> None:
    long = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        long += [path.name] if len(text.splitlines()) > MAX_MODULE_LINES else []
        long += [
            f"{name_of(path)}.{node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
        ]
    assert not long


def test_docstrings_begin_with_a_verb_that_says_what_is_done() -> None:
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    unclear = [
        f"{name_of(path)}: {docstring.splitlines()[0]}"
        for path in (*MODULES, *BESIDE)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, nodes) and (docstring := ast.get_docstring(node))
        if docstring.split()[0] in UNCLEAR_VERBS
    ]
    assert not unclear


def test_neither_modules_nor_folders_import_each_other_in_a_circle() -> None:
    modules = {name_of(path) for path in MODULES}
    edges = {name_of(path): imports_of(path, modules) for path in MODULES}
    assert cycle(edges) == []
    folders: dict[str, set[str]] = {}
    for module, targets in edges.items():
        for target in targets:
            here, there = (*module.split("."), "")[1], (*target.split("."), "")[1]
            if here and there and here != there:
                folders.setdefault(here, set()).add(there)
    assert cycle(folders) == []
