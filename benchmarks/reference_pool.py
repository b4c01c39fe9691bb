"""dpo_ray's side of the benchmark `reference.py`: the engine pool of one engine, with store and look-up.

What is timed is, for the pairs of a turn: looking them up in the store, cutting them to granules, scoring them in the
pool's engine (another process) and committing their log-probs to the store. Ray's and the engine's start come before the clock.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from turns import Answer, answer_tasks

from dpo_ray.artifacts.storage import Storage
from dpo_ray.cluster.session import session
from dpo_ray.config.load import validate_recipe
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.reference.missing import find_missing
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.store import Numerics, ReferenceStore

GROUPS = pa.schema(
    [
        ("group_id", pa.binary(16)),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
    ]
)


def main() -> None:
    args = _arguments()
    settings = ScorerSettings(
        "vllm", str(args.model), "float32", "cpu", args.max_length_tokens, None, 0.5, share_prompt=args.sharing
    )
    config = ReferenceConfig(cpus_per_replica=args.cores, share_prompt=args.sharing)
    store = ReferenceStore(Storage(args.scratch), "benchmark", Numerics("vllm", "", "cpu", "float32", "float32"))
    recipe = validate_recipe(
        {
            "name": "benchmark",
            "model": {"path": str(args.model)},
            "data": {"train": {"type": "synthetic", "pairs": 1}},
            "evaluate": {"sample_prompts": 0},
            "ray": {"cpus": args.cores + 1},
            "reference": config.model_dump(),
        }
    )
    with session(recipe):
        pool = EnginePool(settings, store, config, 0.0, print)

        def work(task: dict[str, Any]) -> Answer:
            pairs = json.loads(Path(task["pairs"]).read_text())
            groups = [
                {
                    "group_id": i.to_bytes(16, "big"),
                    "prompt_ids": pair["prompt_ids"],
                    "completion_ids": [pair["chosen_ids"], pair["rejected_ids"]],
                }
                for i, pair in enumerate(pairs)
            ]
            table = pa.Table.from_pylist(groups, schema=GROUPS)
            began = time.perf_counter()
            missing, _ = find_missing(table, store, store.index())
            granules = [
                missing.slice(i, config.groups_per_granule) for i in range(0, len(missing), config.groups_per_granule)
            ]
            scored = list(pool.run(ray.put(granule) for granule in granules))
            seconds = time.perf_counter() - began
            return {
                "seconds": seconds,
                "cached_tokens": sum(s.cached_tokens for s in scored),
                "rescored": sum(s.rescored for s in scored),
                "sums": _sums(store, table),
            }

        try:
            answer_tasks({}, work)
        finally:
            pool.close()


def _sums(store: ReferenceStore, table: pa.Table) -> list[list[float]]:
    """Read the log-probs of each pair's completions back from the store."""
    logps = store.fetch(store.index(), store.keys(table))
    sums = [float(values.values.to_numpy().astype("float64").sum()) for values in logps]
    return [sums[i : i + 2] for i in range(0, len(sums), 2)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--scratch", required=True, type=Path, help="the store's place")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--max-length-tokens", type=int, default=511)
    parser.add_argument("--no-sharing", dest="sharing", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
