"""What a training run is told, and where its metrics go. Light to import: Ray's controller and the inbox load it too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.train import TrainConfig

# Stored and own log-probs of a sample -> figures; raises AuditError. Given by the pipeline, which knows the reference.
Audit = Callable[[list[list[np.ndarray]], list[list[np.ndarray]]], dict[str, Any]]


@dataclass(frozen=True)
class TrainTask:
    """Everything that a worker needs. Pickles."""

    model: ModelConfig
    config: TrainConfig
    dtype: str
    template: str
    schedule: Artifact
    checkpoints: Storage
    staging: Staging
    inbox: Any  # handle of the driver's MetricsInbox
    audit: Audit | None
    audit_groups: int


class MetricsInbox:
    """An actor that holds rows from rank 0 until the driver takes them."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def put(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        rows, self._rows = self._rows, []
        return rows


def train_worker(settings: dict[str, TrainTask]) -> dict[str, Any]:
    """Run one training process. What it needs is imported here, in the process that needs it: torch and transformers
    take seconds, and Ray's controller unpickles this function as well.
    """
    from .worker import train_and_export

    return train_and_export(settings["task"])
