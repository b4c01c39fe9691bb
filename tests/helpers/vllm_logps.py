"""Log-probs of completions as vLLM computes them, by a pool of one engine and a store that nobody else has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.reference.completions import EngineModel, completion_logps
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.store.store import Numerics, ReferenceStore
from tests.helpers.role_resources import ENGINE


def vllm_logps(
    model_dir: Path, max_length_tokens: int, prompts: Sequence[list[int]], completions: Sequence[list[int]], root: Path
) -> np.ndarray:
    """Score one completion of each prompt under a model in float32; float64 [prompts], nats."""
    settings = ScorerSettings("vllm", str(model_dir), "float32", "cpu", max_length_tokens, 2048, 0.5, share_prompt=True)
    store = ReferenceStore(Storage(str(root)), "policy", Numerics("vllm", "tested", "cpu", "float32", "float32"))
    pool = EnginePool(settings, store, ReferenceConfig(), ENGINE, print, living=True)
    try:
        return completion_logps(pool, EngineModel(settings, store), prompts, completions, 1000)
    finally:
        pool.close()
