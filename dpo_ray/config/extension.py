"""What other packages may add by their entry points, and the classes that their configuration inherits."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal

from pydantic import Field

from .base import StrictModel

# Groups of entry points. The name of an entry is the `type` (of a format and a tracker: the name) that a recipe uses.
OBJECTIVE_CONFIGS = "dpo_ray.objective_configs"  # a subclass of ObjectiveConfig
OBJECTIVES = "dpo_ray.objectives"  # its loss: a function like those of dpo_ray.objectives
JUDGE_CONFIGS = "dpo_ray.judge_configs"  # a subclass of JudgeConfig
JUDGES = "dpo_ray.judges"  # builds the judge that works: called with (config, memory, device, spending)
FORMATS = "dpo_ray.formats"  # a dpo_ray.data.formats.format.Format
TRACKERS = "dpo_ray.trackers"  # a function from the run's directory to a dpo_ray.observe.sinks.Tracker


def installed(group: str) -> dict[str, Any]:
    """Import everything that installed packages add to a group, by name. Ray's workers need the same packages."""
    return {entry.name: entry.load() for entry in entry_points(group=group)}


def installed_names(group: str) -> tuple[str, ...]:
    """List what installed packages add to a group, sorted by name, without importing anything."""
    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


class ObjectiveConfig(StrictModel):
    """The base of every objective: the facts of its loss that other parts of the project depend on."""

    uses_reference: ClassVar[bool] = True
    """False: the stage `reference` is skipped."""

    per_token: ClassVar[bool] = False
    """Rewards and margins are averages over a completion's tokens."""

    learns_from: ClassVar[Literal["pairs", "completions", "lists"]] = "pairs"
    """completions: single ones with labels. lists: rankings of two or more."""

    step_wide: ClassVar[bool] = False
    """The loss of one completion depends on others of the step."""

    diverges: ClassVar[bool] = False
    """Other f-divergences than the reverse KL change it."""

    weighable: ClassVar[bool] = True
    """WPO's weights of pairs apply."""

    compares_lengths: ClassVar[bool] = True
    """LD-DPO's weights of tokens apply."""

    takes_soft_labels: ClassVar[bool] = False
    """The loss takes `preference_probability` into account itself; otherwise it is mixed with the loss of the swapped
    pair."""


class JudgeConfig(StrictModel):
    """The base of every judge: the processes it runs in, and what these need."""

    replicas: int = Field(default=1, gt=0)
    cpus_per_replica: float = Field(default=1.0, gt=0)
    questions_per_batch: int = Field(default=64, gt=0)
    """Prompts, each with its completions, that one call gets."""

    not_in_digest: ClassVar[frozenset[str]] = frozenset({"replicas", "cpus_per_replica", "questions_per_batch"})
    """Fields that change how the judge works and not its verdicts: earlier verdicts stay valid when they change."""

    loads_weights: ClassVar[bool] = False
    """Building it takes long, so that a run does not try this before its first round."""

    def gpus(self) -> float:
        """Return how many GPUs each process requests."""
        return 0.0

    def environment(self) -> set[str]:
        """Return the environment variables that its processes need, such as the one with an API key."""
        return set()

    def urls(self) -> set[str]:
        """Return the addresses that its processes call, for the network rules of a cluster."""
        return set()

    def identity(self) -> dict[str, Any]:
        """Return what else its verdicts depend on besides its fields, such as the digest of a file."""
        return {}
