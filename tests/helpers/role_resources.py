"""What a training worker and an engine request from Ray in tests: one CPU."""

from __future__ import annotations

from dpo_ray.cluster.resources import Resources

WORKER = Resources("training workers", 1.0)
ENGINE = Resources("engines", 1.0)
