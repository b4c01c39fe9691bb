"""docs/extending.md and the tables in the code name the same things."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from dpo_ray.config.judge import BuiltIn as BuiltInJudge
from dpo_ray.config.objective import BuiltIn as BuiltInObjective
from dpo_ray.config.sources import BuiltInFormat
from dpo_ray.data.formats.catalog import FORMATS
from dpo_ray.objectives.select import LOSSES
from dpo_ray.online.judges.make import MAKERS

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")


def test_every_path_on_the_page_exists() -> None:
    paths = re.findall(r"`((?:dpo_ray|tests|docs)/[\w./]+)`", PAGE)
    assert len(paths) > 30
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_every_configuration_has_its_entry() -> None:
    assert LOSSES.keys() == {config.model_fields["type"].default for config in get_args(BuiltInObjective)}
    assert MAKERS.keys() == {config.model_fields["type"].default for config in get_args(BuiltInJudge)}
    assert FORMATS.keys() == {*get_args(BuiltInFormat)} - {"auto"}
