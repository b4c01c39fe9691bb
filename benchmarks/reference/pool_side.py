"""dpo_ray's side of the benchmark `reference.py`: the engine pool of one engine, with look-up and store.

What is timed is, for the pairs of a turn: looking them up in the store, cutting them to granules, scoring them in the pool's
engine (another process) and committing their log-probs to the store. Each turn has a pool and a store of its own; its engine
scores other pairs first, and the clock begins when it has, so Ray's and the engine's start are outside of it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from benchmarks.common.turns import Answer, answer_tasks
from dpo_ray.artifacts.storage import Storage
from dpo_ray.cluster.resources import engine_resources
from dpo_ray.cluster.session import session
from dpo_ray.config.load import validate_recipe
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.reference.engine import start_vllm
from dpo_ray.reference.granule import GRANULE
from dpo_ray.reference.lookup import find_missing
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.scorer import Scorer, ScoreRequest, ScorerSettings
from dpo_ray.reference.store.store import Numerics, ReferenceStore


@dataclass(frozen=True)
class WarmStart:
    """Starts vLLM and scores other pairs with it, so that the pool's first granule meets a warm engine; notes when it is ready."""

    warm_up: pa.Table
    ready: Path

    def __call__(self, settings: ScorerSettings) -> Scorer:
        scorer = start_vllm(settings)
        rows = enumerate(self.warm_up.to_pylist())
        requests = [
            ScoreRequest(i, np.array(row["prompt_ids"], np.int32), np.array(ids, np.int32))
            for i, row in rows
            for ids in row["completion_ids"]
        ]
        scorer.score(requests)
        self.ready.write_text(repr(time.time()))
        return scorer

    def ready_unix_seconds(self) -> float:
        return float(self.ready.read_text())


def main() -> None:
    args = _arguments()
    args.scratch.mkdir(parents=True, exist_ok=True)
    settings = ScorerSettings(
        "vllm", str(args.model), "float32", "cpu", args.max_length_tokens, None, 0.5, share_prompt=args.sharing
    )
    config = ReferenceConfig(share_prompt=args.sharing)
    recipe = validate_recipe(
        {
            "name": "benchmark",
            "model": {"path": str(args.model)},
            "data": {"train": {"type": "synthetic", "pairs": 1}},
            "evaluate": {"sample_prompts": 0},
            "reference": config.model_dump(),
            "cluster": {"roles": {"reference": {"cpus": args.cores}}},
        }
    )
    engine = engine_resources(recipe.cluster.roles.reference, gpus=0.0)
    with session(recipe):

        def work(task: dict[str, Any]) -> Answer:
            warm_up, table = _table(task["warm_up"]), _table(task["pairs"])
            numerics = Numerics("vllm", Path(task["pairs"]).stem, "cpu", "float32", "float32")  # an empty store
            store = ReferenceStore(Storage(args.scratch), "benchmark", numerics)
            began = time.perf_counter()
            missing, _ = find_missing(table, store, store.index())
            look_up_seconds = time.perf_counter() - began
            size = config.groups_per_granule
            start = WarmStart(warm_up, args.scratch / f"ready-{Path(task['pairs']).stem}")
            granules = [missing.slice(i, size) for i in range(0, len(missing), size)]
            answers = EnginePool(settings, store, config, engine, print, start).run(
                ray.put(granule.combine_chunks()) for granule in granules
            )
            scored = [next(answers) for _ in granules]
            seconds = time.time() - start.ready_unix_seconds() + look_up_seconds
            answers.close()
            return {
                "seconds": seconds,
                "cached_tokens": sum(s.cached_tokens for s in scored),
                "rescored": sum(s.rescored for s in scored),
                "sums": _sums(store, table),
            }

        answer_tasks({}, work)


def _table(pairs: str) -> pa.Table:
    groups = [
        {
            "group_id": i.to_bytes(16, "big"),
            "prompt_ids": pair["prompt_ids"],
            "completion_ids": [pair["chosen_ids"], pair["rejected_ids"]],
        }
        for i, pair in enumerate(json.loads(Path(pairs).read_text()))
    ]
    return pa.Table.from_pylist(groups, schema=GRANULE)


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
