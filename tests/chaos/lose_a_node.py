"""Score with a pool on a Ray cluster of three nodes, one of which is lost in mid-scoring. Prints what came of it as JSON.

A program of its own, as a process has one Ray: `lose_a_node.py DIRECTORY lose|keep`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.models.load import model_directory
from dpo_ray.reference.engine import start_vllm
from dpo_ray.reference.granule import GRANULE
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.scorer import Scorer, ScoreRequest, ScorerSettings
from dpo_ray.reference.store import Numerics, ReferenceStore

GRANULES, GROUPS = 10, 24
ENGINE_LABEL = {"dpo/role": "reference"}


class CountingScorer:
    """vLLM, and a file to which each scored sequence adds a byte, whatever becomes of the process."""

    def __init__(self, scorer: Scorer, log: Path) -> None:
        self._scorer, self._log = scorer, log

    @property
    def cached_tokens(self) -> int:
        return self._scorer.cached_tokens

    @property
    def rescored(self) -> int:
        return self._scorer.rescored

    def score(self, requests: list[ScoreRequest]) -> list[np.ndarray | None]:
        scores = self._scorer.score(requests)
        with self._log.open("ab") as log:
            log.write(b"x" * len(requests))
        return scores

    def close(self) -> None:
        self._scorer.close()


def granules() -> list[pa.Table]:
    rng = np.random.default_rng(0)
    tables = []
    for g in range(GRANULES):
        rows = [
            {
                "group_id": (g * GROUPS + i).to_bytes(16, "big"),
                "prompt_ids": rng.integers(5, 80, rng.integers(4, 40)).tolist(),
                "completion_ids": [rng.integers(5, 80, rng.integers(1, 20)).tolist() for _ in range(2)],
            }
            for i in range(GROUPS)
        ]
        tables.append(pa.Table.from_pylist(rows, schema=GRANULE))
    return tables


def main(directory: Path, *, lose: bool) -> None:
    os.environ.pop("RAY_ADDRESS", None)
    memory = {"object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory})
    nodes = [cluster.add_node(num_cpus=1, labels=ENGINE_LABEL, **memory) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    model = str(model_directory(ModelConfig(path="builtin:sentiment_llama")))
    settings = ScorerSettings("vllm", model, "float32", "cpu", 128, 2048, 0.5, share_prompt=True)
    store = ReferenceStore(Storage(directory), "a" * 64, Numerics("vllm", "0.32.0", "cpu", "float32", "float32"))
    log = directory / "scored"
    config, events = ReferenceConfig(replicas=2, node_labels=ENGINE_LABEL), []
    pool = EnginePool(settings, store, config, 0.0, events.append, lambda s: CountingScorer(start_vllm(s), log))
    tables, results = granules(), []
    lost: Any = None
    for scored in pool.run(ray.put(table) for table in tables):
        results.append(scored)
        if lose and lost is None and pool.ready == 2:
            lost = next(n for n in nodes if n.node_id == pool.nodes[scored.engine])
            cluster.remove_node(lost, allow_graceful=False)
    index = store.index()
    values = store.fetch(index, np.concatenate([store.keys(table) for table in tables])).to_pylist()
    print(
        json.dumps(
            {
                "groups": sum(s.groups for s in results),
                "sequences": sum(s.sequences for s in results),
                "scored": log.stat().st_size,
                "keys": len(index),
                "values": values,
                "lost": lost is not None,
                "events": events,
            }
        )
    )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), lose=sys.argv[2] == "lose")
