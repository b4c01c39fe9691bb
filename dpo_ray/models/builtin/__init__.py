"""Models so small that they are part of the package. With them, the quickstart and the tests need no download."""

from __future__ import annotations

from pathlib import Path

from dpo_ray.errors import ConfigError


def builtin_model(name: str) -> Path:
    """Return the directory of a model of this package, in Hugging Face format; raise ConfigError if the name is unknown."""
    here = Path(__file__).parent
    names = sorted(path.parent.name for path in here.glob("*/config.json"))
    if name not in names:
        what, fix = f"no builtin model is named {name!r}", f"use one of: {', '.join(names)}"
        raise ConfigError(what, where=f"model.path=builtin:{name}", fix=fix)
    return here / name
