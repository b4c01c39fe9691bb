"""Provenance: what an artifact records about how it was made. Every stage records the same fields, from the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .artifact import Artifact
from .manifest import FileEntry
from .staging import Staging


@dataclass(frozen=True)
class Provenance:
    """Inputs, configuration and versions of a stage. The stage's duration counts from the creation of the object."""

    stage_version: int
    inputs: dict[str, str]
    config: dict[str, Any]
    versions: dict[str, str]
    may_commit: Callable[[], object] = lambda: None  # raises if another driver has taken over the run
    began_monotonic_seconds: float = field(default_factory=time.monotonic)

    def commit(
        self, staging: Staging, files: Iterable[FileEntry], *, rows: dict[str, int], figures: dict[str, Any]
    ) -> Artifact:
        """Commit a staged artifact with this provenance.

        Raises:
            LeaseError: another driver has taken over the run.
        """
        self.may_commit()
        return staging.commit(
            files,
            stage_version=self.stage_version,
            rows=rows,
            inputs=self.inputs,
            config=self.config,
            figures=figures,
            versions=self.versions,
            seconds=time.monotonic() - self.began_monotonic_seconds,
        )
