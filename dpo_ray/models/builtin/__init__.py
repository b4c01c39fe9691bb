"""Models that are small enough to ship in the package, so that the quickstart and the tests need no download."""

from __future__ import annotations

from pathlib import Path

from dpo_ray.errors import ConfigError


def builtin_model(name: str) -> Path:
    """Return the directory of a shipped model, in Hugging Face format; raise ConfigError if there is none."""
    here = Path(__file__).parent
    names = sorted(path.parent.name for path in here.glob("*/config.json"))
    if name not in names:
        what, fix = f"no builtin model is named {name!r}", f"use one of: {', '.join(names)}"
        raise ConfigError(what, where=f"model.path=builtin:{name}", fix=fix)
    return here / name
