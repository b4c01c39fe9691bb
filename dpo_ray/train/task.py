"""What a training run is told. Light to import: Ray's controller loads it too."""

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
    """How the reference is audited before step 1. Given by the pipeline, which knows the reference. Pickles."""

    groups: int  # at least so many are compared, where there are as many
    measure: Callable[[list[ComparedGroup]], dict[str, Any]]
    goes_on: Callable[[dict[str, Any]], bool]  # whether to train, given what was measured now or by an earlier attempt


@dataclass(frozen=True)
class TrainTask:
    """Everything that a worker needs. Pickles."""

    model: ModelConfig
    config: TrainConfig
    dtype: str
    template: str
    schedule: Schedule
    checkpoints: Storage
    staging: Staging
    inbox: Any  # handle of the driver's inbox
    audit: AuditTask | None
    sources: tuple[str, ...] = ()  # of the training data
    seed: int = 0
    trained_adapter: str | None = None  # directory of the LoRA adapter that training goes on with
    moments: Artifact | None = None  # of the training before, whose optimizer this one goes on with
    keep_moments: bool = False  # in the artifact, for the training after
    identity: str = ""  # of what determines the weights; checkpoints of another are not used
