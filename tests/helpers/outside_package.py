"""A package of somebody else that adds an objective, a format, a judge and a tracker to dpo_ray by entry points.

It is written as pip would install it: modules, and a `dist-info` with the entry points.
"""

from __future__ import annotations

from pathlib import Path

OBJECTIVE_CONFIG = '''\
"""A squared hinge, as a recipe has it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dpo_ray.config.extension import ObjectiveConfig


class SquaredHinge(ObjectiveConfig):
    """max(0, 1 - beta * margin)^2."""

    type: Literal["squared_hinge"] = "squared_hinge"
    beta: float = Field(default=0.1, gt=0)
'''

OBJECTIVE = '''\
"""The loss of a squared hinge."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ray.objectives.pairs import PairLogps

from .objective_config import SquaredHinge


def squared_hinge(pairs: PairLogps, o: SquaredHinge) -> Tensor:
    """Compute the loss of every pair: float32 [pairs]."""
    return torch.relu(1 - o.beta * pairs.margin) ** 2
'''

FORMAT = '''\
"""Votes: a question, two answers and the number of votes that each got."""

from __future__ import annotations

from dpo_ray.data.formats.format import Format
from dpo_ray.data.groups import TextGroup


def read(fields, criteria) -> TextGroup:
    votes = [float(v) for v in fields.row["votes"]]
    return TextGroup(fields.need("prompt", "MISSING_PROMPT"), tuple(fields.row["replies"]), tuple(votes), (), ())


VOTES = Format("votes", {"prompt": ("topic",), "completions": ("replies",), "scores": ("votes",)}, read, lambda row: "votes" in row)
'''

JUDGE_CONFIG = '''\
"""A judge that counts exclamation marks, as a recipe has it, with what it needs."""

from __future__ import annotations

from typing import Literal

from dpo_ray.config.extension import JudgeConfig


class ExclaimingConfig(JudgeConfig):
    """Counts exclamation marks."""

    type: Literal["exclaiming"] = "exclaiming"
    mark: str = "!"

    def gpus(self) -> float:
        return 0.25

    def environment(self) -> set[str]:
        return {"EXCLAIMING_KEY"}

    def urls(self) -> set[str]:
        return {"http://judge.example:8123/v1"}
'''

JUDGE = '''\
"""A judge that counts exclamation marks, at work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dpo_ray.online.judges.protocol import Question, Usage, Verdict

from .judge_config import ExclaimingConfig


class Exclaiming:
    def __init__(self, config: ExclaimingConfig, memory, device, spending) -> None:
        self._mark = config.mark
        self.usage = Usage()

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        for number, question in enumerate(questions):
            yield number, Verdict(tuple(float(c.count(self._mark)) for c in question.completions))

    def close(self) -> None:
        pass
'''

TRACKER = '''\
"""A tracker that counts the steps in a file."""

from __future__ import annotations


class Counting:
    def __init__(self, run_dir) -> None:
        self._run_dir, self._steps = run_dir, 0

    def begin(self, known) -> None:
        self._steps = len(known)

    def write(self, row) -> None:
        self._steps += 1

    def close(self) -> None:
        self._run_dir.write("steps.txt", str(self._steps).encode())
'''

ENTRY_POINTS = """\
[dpo_ray.objective_configs]
squared_hinge = outside.objective_config:SquaredHinge
[dpo_ray.objectives]
squared_hinge = outside.objective:squared_hinge
[dpo_ray.formats]
votes = outside.format:VOTES
[dpo_ray.judge_configs]
exclaiming = outside.judge_config:ExclaimingConfig
[dpo_ray.judges]
exclaiming = outside.judge:Exclaiming
[dpo_ray.trackers]
counting = outside.tracker:Counting
"""


FILES = {
    "objective_config": OBJECTIVE_CONFIG,
    "objective": OBJECTIVE,
    "format": FORMAT,
    "judge_config": JUDGE_CONFIG,
    "judge": JUDGE,
    "tracker": TRACKER,
}


def write_outside_package(site: Path, entry_points: str = ENTRY_POINTS, version: str = "1.0") -> None:
    """Write the package into a directory that is to be on PYTHONPATH: a file for each thing that it adds."""
    package, about = site / "outside", site / "outside-1.0.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    (package / "__init__.py").write_text("")
    for name, text in FILES.items():
        (package / f"{name}.py").write_text(text)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: outside\nVersion: {version}\n")
    (about / "entry_points.txt").write_text(entry_points)
