"""The input of a training run. The module imports quickly because Ray's controller loads it too."""

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
    """The audit of the reference before step 1. Built by the pipeline, which knows the reference. Can be pickled."""

    groups: int  # minimum number of groups to compare, if there are as many
    measure: Callable[[list[ComparedGroup]], dict[str, Any]]
    goes_on: Callable[[dict[str, Any]], bool]  # whether to train, from the figures of this or a previous attempt


@dataclass(frozen=True)
class TrainTask:
    """Everything that a worker needs. Can be pickled."""

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
    identity: str = ""  # digest of all that determines the weights; checkpoints with another are not used
