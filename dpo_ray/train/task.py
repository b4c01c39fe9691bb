"""The inputs of a training run. This module must import quickly, because Ray's controller imports it too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.train import TrainConfig
from dpo_ray.schedule.audit_pairs import ComparedGroup
from dpo_ray.schedule.files import Schedule


@dataclass(frozen=True)
class AuditTask:
    """The settings of the audit before step 1, which compares stored log-probs with the trainer's. Can be pickled.

    `measure` and `goes_on` are functions of the package `reference`, which this package must not import.
    """

    groups: int  # minimum number of groups to compare; fewer only if the data has fewer
    measure: Callable[[list[ComparedGroup]], dict[str, Any]]  # computes the figures
    goes_on: Callable[[dict[str, Any]], bool]  # decides by the figures (of this or a previous attempt) whether to train


@dataclass(frozen=True)
class TrainTask:
    """Everything that a training worker needs. Can be pickled."""

    model: ModelConfig
    config: TrainConfig
    dtype: str
    template: str
    schedule: Schedule
    checkpoints: Storage
    staging: Staging
    inbox: Any  # handle of the driver's inbox
    audit: AuditTask | None
    cpus: float  # of each worker
    sources: tuple[str, ...] = ()  # names of the training data's sources
    seed: int = 0
    trained_adapter: str | None = None  # directory of the LoRA adapter that training continues from
    moments: Artifact | None = None  # optimizer state of the previous training, to continue from
    keep_moments: bool = False  # store the optimizer state in the artifact, for the next training
    identity: str = ""  # digest of everything that determines the weights; checkpoints with another digest are not used
