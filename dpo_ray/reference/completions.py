"""Completions for evaluations: a pool of engines samples them, and computes their log-probs under any model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray

from dpo_ray.errors import EngineError
from dpo_ray.reference.store.store import ReferenceStore

from .granule import GRANULE
from .lookup import cut, find_missing
from .pool import EnginePool
from .sampling import Sampled, Sampling, prompt_key
from .scorer import ScorerSettings

SampledCompletion = tuple[tuple[int, ...], bool]  # token ids; True if they end with an end-of-turn token


@dataclass(frozen=True)
class EngineModel:
    """The settings with which engines load a model, and the store for the model's log-probs."""

    settings: ScorerSettings
    store: ReferenceStore


def sample_completions(
    pool: EnginePool, model: EngineModel, table: pa.Table, sampling: Sampling, groups_per_granule: int
) -> list[SampledCompletion]:
    """Sample one completion for each row of a table of prompts; return them in the order of the rows.

    Args:
        table: of schema PROMPTS.
        groups_per_granule: number of prompts that an engine gets at once.

    Raises:
        EngineError: a prompt has no completion, because engines died repeatedly while they sampled for this prompt.
    """
    pool.load(model.settings, model.store)
    by_prompt: dict[bytes, SampledCompletion] = {}
    with closing(pool.sample(_put([table], groups_per_granule), sampling)) as answers:
        for answer in answers:
            if not isinstance(answer, Sampled):
                raise EngineError(
                    f"{answer.groups} held-out prompts have no completion: engines died repeatedly while they sampled for these prompts",
                    where=model.settings.model_dir,
                    fix="remove their rows from data.eval, or give the engines more memory; --verbose shows their logs",
                )
            for row in answer.table.to_pylist():
                by_prompt[row["group_id"]] = tuple(row["completion_ids"][0]), row["ended"][0]
    return [by_prompt[prompt_key(ids)] for ids in table["prompt_ids"].to_pylist()]


def completion_logps(
    pool: EnginePool,
    model: EngineModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    groups_per_granule: int,
) -> np.ndarray:
    """Compute the log-prob of one completion per prompt. Only log-probs that the store lacks are computed.

    Returns:
        float64 [prompts], in nats: the sum over the tokens of each completion; 0 for an empty completion.

    Raises:
        EngineError: the log-probs of a completion are not finite, or engines died repeatedly while scoring.
    """
    rows = [i for i, completion in enumerate(completions) if len(completion)]
    columns = {
        "group_id": [i.to_bytes(16, "big") for i in rows],
        "prompt_ids": [list(prompts[i]) for i in rows],
        "completion_ids": [[list(completions[i])] for i in rows],
    }
    table, store, sums = pa.table(columns, schema=GRANULE), model.store, np.zeros(len(completions))
    missing, _ = find_missing(table, store, store.index())
    if len(missing):
        pool.load(model.settings, store)
        with closing(pool.run(_put([missing], groups_per_granule))) as answers:
            for scored in answers:
                if scored.unscored:
                    raise EngineError(
                        f"a sampled completion has no log-probs ({scored.unscored[0].detail})",
                        where=model.settings.model_dir,
                        fix="check the model: training may have broken it",
                    )
    for row, logps in zip(rows, store.fetch(store.index(), store.keys(table)).to_pylist(), strict=True):
        sums[row] = np.sum(np.array(logps, np.float64))
    return sums


def _put(tables: Iterable[pa.Table], groups_per_granule: int) -> Iterator[ray.ObjectRef]:
    """Cut tables into granules, and yield a reference to each granule."""
    return (ray.put(granule) for granule in cut(tables, groups_per_granule))
