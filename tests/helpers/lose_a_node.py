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
from dpo_ray.cluster.resources import Resources
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.models.load import model_directory
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.store.store import Numerics, ReferenceStore

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers.fakes import scorers

ray.cloudpickle.register_pickle_by_value(scorers)  # engines' processes do not find the tests' modules
GRANULES, GROUPS = 10, 24
ENGINE_LABEL = {"dpo/role": "reference"}


def granules() -> list[pa.Table]:
    rng = np.random.default_rng(0)
    return [scorers.granule(g * GROUPS, GROUPS, rng) for g in range(GRANULES)]


def main(directory: Path, *, lose: bool) -> None:
    os.environ.pop("RAY_ADDRESS", None)
    memory = {"object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory})
    nodes = [cluster.add_node(num_cpus=1, labels=ENGINE_LABEL, **memory) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    model = str(model_directory(ModelConfig(path="builtin:sentiment_llama")))
    settings = ScorerSettings("vllm", model, "float32", "cpu", 128, 2048, 0.5, share_prompt=True)
    store = ReferenceStore(Storage(directory), "a" * 64, Numerics("vllm", "0.32.0", "cpu", "float32", "float32"))
    start = scorers.Start(directory, vllm=True, together=2)  # else one may be done before the other is ready
    config, events = ReferenceConfig(replicas=2), []
    pool = EnginePool(settings, store, config, Resources("engines", 1.0, labels=ENGINE_LABEL), events.append, start)
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
                "scored": start.scored,
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
