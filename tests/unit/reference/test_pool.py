"""Whether engines that die as they start would die on other machines, too."""

from __future__ import annotations

import pytest

from dpo_ray.reference.pool import died_alike

LIBRARY = "AttributeError: '_OpNamespace' '_C' object has no attribute 'init_cpu_memory_env'"


@pytest.mark.parametrize(
    ("causes", "alike"),
    [
        ([LIBRARY] * 3, True),
        ([f"the worker process {pid} (node 7f{pid}ab) was killed with signal 9" for pid in (101, 2044, 33)], True),
        ([LIBRARY, LIBRARY, "RuntimeError: no free port"], False),
        (["The actor is dead: the actor's node was terminated unexpectedly: 3f0c1a"] * 3, False),
        (["its node has died"] * 3, False),
    ],
    ids=["a missing library", "other numbers", "another cause", "lost nodes", "dead nodes"],
)
def test_engines_that_died_of_one_cause_would_die_again(causes: list[str], alike: bool) -> None:
    assert died_alike(causes) is alike
