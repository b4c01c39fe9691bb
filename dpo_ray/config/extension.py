"""What other packages may add by their entry points, and the classes that their configuration inherits."""

from __future__ import annotations

import functools
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Literal

from pydantic import Field

from dpo_ray.errors import ConfigError

from .base import MOST_CPUS, MOST_PROCESSES, StrictModel

# Groups of entry points. The name of an entry is the `type` (of a format and a tracker: the name) that a recipe uses.
OBJECTIVE_CONFIGS = "dpo_ray.objective_configs"  # a subclass of ObjectiveConfig
OBJECTIVES = "dpo_ray.objectives"  # its loss: a function like those of dpo_ray.objectives
JUDGE_CONFIGS = "dpo_ray.judge_configs"  # a subclass of JudgeConfig
JUDGES = "dpo_ray.judges"  # builds the judge that works: called with (config, memory, device, spending)
FORMATS = "dpo_ray.formats"  # a dpo_ray.data.formats.format.Format
TRACKERS = "dpo_ray.trackers"  # a function from the run's directory to a dpo_ray.observe.sinks.Tracker


@functools.cache
def _entries(group: str) -> tuple[EntryPoint, ...]:
    return tuple(_all_entries().select(group=group))


@functools.cache
def _all_entries() -> Any:  # the type differs between versions of Python; all have `select`
    """Read the entry points of all packages once: it takes tens of milliseconds, in every process of a run."""
    return entry_points()


def installed(group: str, built_in: Collection[str] = ()) -> dict[str, Any]:
    """Import everything that installed packages add to a group, by name. Ray's workers need the same packages.

    Raises:
        ConfigError: as `installed_names` does, or what a package adds cannot be imported.
    """
    installed_names(group, built_in)
    added: dict[str, Any] = {}
    for entry in _entries(group):
        try:
            added[entry.name] = entry.load()
        except Exception as error:
            what = f"{entry.value} cannot be imported: {type(error).__name__}: {error}"
            raise ConfigError(what, where=_where(entry), fix="repair the package, or uninstall it") from error
    return added


def installed_configs(group: str, built_in: Collection[str], implementations: str) -> tuple[type[StrictModel], ...]:
    """Import the configurations that installed packages add, each of which needs an implementation of the same name.

    Raises:
        ConfigError: as `installed` does; or a name has no implementation, or is not the `type` of its configuration.
    """
    configs = installed(group, built_in)
    for name, config in configs.items():
        if name not in installed_names(implementations):
            fix = f"add an entry point of that name to {implementations}"
            raise ConfigError(f"`{name}` has a configuration and no implementation", where=group, fix=fix)
        if config.model_fields["type"].default != name:
            fix = "name the entry point as the configuration's `type`"
            raise ConfigError(f"`{name}` is not the type of its configuration", where=group, fix=fix)
    return tuple(configs.values())


def installed_names(group: str, built_in: Collection[str] = ()) -> tuple[str, ...]:
    """List what installed packages add to a group, sorted by name, without importing anything.

    Args:
        built_in: names that dpo_ray has itself, which no package may take.

    Raises:
        ConfigError: a name is taken, by dpo_ray or by another package.
    """
    names = set(built_in)
    for entry in _entries(group):
        if entry.name in names:
            fix = "rename it in the package, or uninstall that"
            raise ConfigError(f"`{entry.name}` is there already", where=_where(entry), fix=fix)
        names.add(entry.name)
    return tuple(sorted(names.difference(built_in)))


def packages_of(group: str, names: Collection[str]) -> list[str]:
    """List the packages, with their versions, that add these names to a group: what is made by their code depends on it."""
    return sorted({_package(entry) for entry in _entries(group) if entry.name in names})


def _where(entry: EntryPoint) -> str:
    return f"{_package(entry)}, entry point {entry.name} of {entry.group}"


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


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

    replicas: int = Field(default=1, gt=0, le=MOST_PROCESSES)
    cpus_per_replica: float = Field(default=1.0, ge=0.001, le=MOST_CPUS)
    questions_per_batch: int = Field(default=64, gt=0, le=1_000_000)
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
