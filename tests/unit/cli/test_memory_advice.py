"""How the error of a worker that was killed for lack of memory quotes what the planner expects."""

from __future__ import annotations

import re

from dpo_ray.cli.memory_advice import with_expectation
from dpo_ray.config.load import validate_recipe
from dpo_ray.errors import MemoryLimitError
from tests.helpers.good_recipe import GOOD


def test_the_error_quotes_the_expectation() -> None:
    recipe = validate_recipe(GOOD, where="a test")
    for field, words in (("training", r"for each of \d+ training workers"), ("engines", "for each engine")):
        where = f"cluster.kubernetes.{field}.memory_gib"
        error = with_expectation(recipe, MemoryLimitError("killed", where=where, fix="raise it"))
        assert re.fullmatch(rf"killed; the planner expects [\d.]+ [GM]iB {words}", error.what)
        assert (error.where, error.fix) == (where, "raise it")
    assert (
        with_expectation(recipe, MemoryLimitError("killed", where="cluster.kubernetes.cpu.memory_gib")).what == "killed"
    )
