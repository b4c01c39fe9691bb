"""Loads and calls the user's own filters, which are functions that decide whether a row is kept."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ray.errors import ConfigError

from .admission import Rejected, sample_of
from .groups import TextGroup

WHERE = "data.rules.filters"


@dataclass(frozen=True)
class ModuleSource:
    """The source code of a module that defines filters, as the driver (the main process) read it."""

    name: str
    file: str
    directory: str  # where the recipe was run
    text: str


@dataclass(frozen=True)
class Filter:
    """A user-defined function, called as `function(prompt, completions)` for each row.

    A pickled filter contains the source code of its module, so workers on other nodes do not need the file. Each worker
    process executes the module once, as an import would do. Modules that the filter's module imports must be available
    on every node: installed, or in the driver's directory if all nodes share that directory.
    """

    name: str  # module:function
    function: Callable[[Any, list[str]], Any]
    digest: str  # of the name and the module's source: another filter leads to other artifacts
    module: ModuleSource | None  # None if it belongs to an installed package, which workers import

    def __reduce__(self):
        return _restored, (self.name, self.digest, self.module)


def load_filters(names: Sequence[str]) -> tuple[Filter, ...]:
    r"""Load the functions that a recipe names as `module:function`.

    A module is searched in the current directory and among the installed ones. For example, the file `my_filters.py`:

        import re
        from functools import cache

        def no_urls(prompt, completions):
            return not any(re.search(r"https?://", text) for text in completions)

        @cache
        def _model():
            import fasttext
            return fasttext.load_model("/models/lid.176.ftz")

        def english(prompt, completions):
            (label,), _ = _model().predict(completions[0].replace("\n", " "))
            return label == "__label__en" or f"language: {label.removeprefix('__label__')}"

    The recipe then lists the functions:

        data:
          rules:
            filters: [my_filters:no_urls, my_filters:english]

    Raises:
        ConfigError: a module cannot be imported, or does not contain the function.
    """
    return tuple(_load(name) for name in names)


def rejected_by(group: TextGroup, filters: Sequence[Filter]) -> Rejected | None:
    """Call the filters in order until one of them excludes the row. Return the rejection, or None if all filters keep the row.

    A filter receives the prompt (text, or a list of messages) and the list of completions (text), best first. It
    returns True to keep the row. To exclude the row, it returns False, or a text with the reason.

    Raises:
        ConfigError: a filter raised an exception, or returned a value of another type. The row itself may be sound.
    """
    for each in filters:
        # Copies: a filter that changes its arguments must not change the row.
        prompt = group.prompt if isinstance(group.prompt, str) else [dict(message) for message in group.prompt]
        completions = [c if isinstance(c, str) else str(c.get("content") or "") for c in group.completions]
        try:
            verdict = each.function(prompt, completions)
        except Exception as error:  # whatever the user's code may raise
            raise _failed(each, f"raised {type(error).__name__}: {error}", group) from error
        if isinstance(verdict, str):
            return Rejected("FILTERED", verdict or each.name)
        if not isinstance(verdict, bool | np.bool_):
            raise _failed(each, f"returned {type(verdict).__name__}, not True, False or text", group)
        if not verdict:
            return Rejected("FILTERED", each.name)
    return None


def _failed(each: Filter, what: str, group: TextGroup) -> ConfigError:
    row = sample_of({"prompt": group.prompt, "completions": group.completions})
    return ConfigError(
        f"`{each.name}` {what}; the row: {row}",
        where=WHERE,
        fix="return True to keep a row, and False or a text with the reason to exclude it",
    )


def _load(name: str) -> Filter:
    module_name = name.split(":")[0]
    try:
        with _importable(os.getcwd()):
            importlib.invalidate_caches()  # the file may be newer than Python's cached listing of its directory
            spec = importlib.util.find_spec(module_name)
        if spec is None:
            raise ModuleNotFoundError(
                f"no module {module_name!r} was found in this directory or among the installed modules"
            )
        content = Path(spec.origin).read_bytes() if spec.has_location and spec.origin else b""
        module = None
        if spec.has_location and spec.origin and not _is_installed(Path(spec.origin)):
            text = importlib.util.decode_source(content)
            module = ModuleSource(module_name, os.path.abspath(spec.origin), os.getcwd(), text)
        digest = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()
        function = _function(name, module)
    except Exception as error:  # a module may raise anything while it is imported
        raise ConfigError(
            f"`{name}` cannot be imported: {type(error).__name__}: {error}",
            where=WHERE,
            fix=f"write it as module:function; put the module into this directory ({os.getcwd()}) or install it",
        ) from error
    return Filter(name, function, digest, module)


def _restored(name: str, digest: str, module: ModuleSource | None) -> Filter:
    try:
        return Filter(name, _function(name, module), digest, module)
    except Exception as error:
        raise ConfigError(
            f"`{name}` cannot be imported on a worker: {type(error).__name__}: {error}",
            where=WHERE,
            fix="write the filter in one file, and install what it imports on every node",
        ) from error


def _function(name: str, module: ModuleSource | None) -> Callable[[Any, list[str]], Any]:
    module_name, function_name = name.split(":")
    function = getattr(_executed(module) if module else importlib.import_module(module_name), function_name)
    if not callable(function):
        raise TypeError(f"{function_name!r} is {type(function).__name__}, not a function")
    return function


@functools.cache
def _executed(source: ModuleSource) -> types.ModuleType:
    """Build a module by executing its source. The driver also does this, so that it runs exactly the code that was hashed."""
    spec = importlib.util.spec_from_file_location(source.name, source.file)
    assert spec is not None  # noqa: S101 - the name ends in .py
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(source.name)
    sys.modules[source.name] = module  # dataclasses look for their module there
    try:
        with _importable(source.directory):
            code = compile(source.text, source.file, "exec", dont_inherit=True)
            exec(code, vars(module))  # noqa: S102 - the user's own code, which the recipe names
    finally:
        sys.modules.pop(source.name, None)
        if before is not None:
            sys.modules[source.name] = before
    return module


def _is_installed(file: Path) -> bool:
    """Return whether a module's file belongs to Python or to an installed package; workers can then import the module."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    return any(file.resolve().is_relative_to(Path(sysconfig.get_path(kind)).resolve()) for kind in kinds)


@contextmanager
def _importable(directory: str) -> Iterator[None]:
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)
