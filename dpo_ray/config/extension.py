"""Extensions: what other packages can add through entry points, and the base classes of their configuration."""

from __future__ import annotations

import functools
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Literal

from pydantic import Field

from dpo_ray.errors import ConfigError

from .base import MOST_CPUS, MOST_PROCESSES, StrictModel

# Groups of entry points. A recipe uses the name of an entry point as `type`, or as the name of a format or a tracker.
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
    """Read the entry points of all installed packages, once in a process because it takes tens of milliseconds."""
    return entry_points()


def installed(group: str, built_in: Collection[str] = ()) -> dict[str, Any]:
    """Import all objects that installed packages add to a group of entry points; return them by name.

    The packages must also be installed where Ray's workers run, because the workers import the same objects.

    Args:
        built_in: the names that dpo_ray itself uses. If a package adds one of these names, ConfigError is raised.

    Raises:
        ConfigError: a name is already taken, or an object cannot be imported.
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
    """Import the configuration classes that installed packages add to a group of entry points.

    Args:
        group: the entry points of the configuration classes.
        built_in: the names that dpo_ray itself uses. If a package adds one of these names, ConfigError is raised.
        implementations: another group of entry points, which must have an entry with the same name for every class.

    Raises:
        ConfigError: a name is already taken or has no implementation, a class cannot be imported, or the `type` of a
            class differs from the name of its entry point.
    """
    configs = installed(group, built_in)
    for name, config in configs.items():
        if name not in installed_names(implementations):
            fix = f"add an entry point of that name to {implementations}"
            raise ConfigError(f"`{name}` has a configuration, but no implementation", where=group, fix=fix)
        if config.model_fields["type"].default != name:
            fix = "use the same name for the entry point and for the `type` of the configuration"
            raise ConfigError(
                f"the `type` in the configuration of `{name}` is not the name of its entry point", where=group, fix=fix
            )
    return tuple(configs.values())


def installed_names(group: str, built_in: Collection[str] = ()) -> tuple[str, ...]:
    """List the names that installed packages add to a group of entry points, sorted, without importing anything.

    Args:
        built_in: the names that dpo_ray itself uses. If a package adds one of these names, ConfigError is raised.

    Raises:
        ConfigError: a package adds a name that dpo_ray or another package already uses.
    """
    names = set(built_in)
    for entry in _entries(group):
        if entry.name in names:
            fix = "rename the entry point in the package, or uninstall the package"
            raise ConfigError(f"the name `{entry.name}` is already taken", where=_where(entry), fix=fix)
        names.add(entry.name)
    return tuple(sorted(names.difference(built_in)))


def packages_of(group: str, names: Collection[str]) -> list[str]:
    """List the packages, with their versions, that add these names to a group of entry points."""
    return sorted({_package(entry) for entry in _entries(group) if entry.name in names})


def _where(entry: EntryPoint) -> str:
    return f"{_package(entry)}, entry point {entry.name} of {entry.group}"


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


class ObjectiveConfig(StrictModel):
    """The base class of all objectives. The class variables describe properties of the loss that other modules need."""

    uses_reference: ClassVar[bool] = True
    """True: the loss needs the reference model's log-probs. False: the stage `reference` is skipped."""

    per_token: ClassVar[bool] = False
    """True: rewards and margins are averages over a completion's tokens. False: they are sums."""

    learns_from: ClassVar[Literal["pairs", "completions", "lists"]] = "pairs"
    """pairs: two completions, one of them preferred. completions: single completions with labels. lists: rankings of two
    or more completions."""

    step_wide: ClassVar[bool] = False
    """True: the loss of one completion depends on other completions of the same step."""

    diverges: ClassVar[bool] = False
    """True: a recipe may combine this loss with other f-divergences than the reverse KL."""

    weighable: ClassVar[bool] = True
    """True: the loss of each pair can be multiplied by the pair's WPO weight (`train.shaping.wpo`)."""

    compares_lengths: ClassVar[bool] = True
    """True: LD-DPO (`train.shaping.ld_alpha`) can reduce the weight of the last tokens of the longer completion of a
    pair, those beyond the length of the shorter one."""

    takes_soft_labels: ClassVar[bool] = False
    """True: the loss function itself uses `preference_probability` p. False: the loss is
    p * (loss of the pair) + (1 - p) * (loss of the pair with chosen and rejected swapped)."""


class JudgeConfig(StrictModel):
    """The base class of all judge configurations: how many processes a judge has, and what one process needs."""

    replicas: int = Field(default=1, gt=0, le=MOST_PROCESSES)
    cpus_per_replica: float = Field(default=1.0, ge=0.001, le=MOST_CPUS)
    questions_per_batch: int = Field(default=64, gt=0, le=1_000_000)
    """Number of prompts, each with its completions, in one call of the judge."""

    not_in_digest: ClassVar[frozenset[str]] = frozenset({"replicas", "cpus_per_replica", "questions_per_batch"})
    """Fields that cannot change the judge's verdicts. Stored verdicts stay valid if these fields change."""

    loads_weights: ClassVar[bool] = False
    """True: the judge loads model weights, which takes long. So the checks at the start of a run do not construct this
    judge."""

    def gpus(self) -> float:
        """Return how many GPUs each process of the judge requests."""
        return 0.0

    def environment(self) -> set[str]:
        """Return the names of the environment variables that the judge's processes need, such as for an API key."""
        return set()

    def urls(self) -> set[str]:
        """Return the URLs that the judge's processes call. The network rules of a cluster must allow these calls."""
        return set()

    def identity(self) -> dict[str, Any]:
        """Return what the verdicts depend on besides the fields of this class, for example the digest of a file."""
        return {}
