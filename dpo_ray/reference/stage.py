"""The stage `reference`: a pool of engines scores what the store lacks; then the store is joined to the groups by key."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.data.tokens import parquet_bytes, read_table, splits
from dpo_ray.errors import ArtifactError

from .scorer import Scorer, ScoreRequest, ScorerSettings
from .store import ReferenceStore, StoreIndex

REFERENCE = pa.schema([("group_id", pa.binary(16)), ("token_logps", pa.list_(pa.list_(pa.float32())))])


@dataclass(frozen=True)
class Granule:
    """What scoring one block of groups came to."""

    groups: int
    scored: int
    found: int
    tokens: int
    cached_tokens: int
    seconds: float


def token_parts(tokens: Artifact) -> list[str]:
    """Name the artifact's parts of admitted groups, training ones first."""
    return [name for split in splits(tokens) for name in tokens.names(f"{split}/")]


def groups_dataset(tokens: Artifact) -> ray.data.Dataset:
    """Describe the reading of a committed tokens artifact; the blocks are as `data.stage.tokenized` gives them."""
    names = [{"name": n} for n in token_parts(tokens)]
    return ray.data.from_items(names, override_num_blocks=len(names)).map_batches(
        _read_parts,  # pyright: ignore[reportArgumentType] - Ray types `fn` as if there were no fn_kwargs
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"tokens": tokens},
    )


def _read_parts(batch: pa.Table, tokens: Artifact) -> Iterator[pa.Table]:
    for name in batch["name"].to_pylist():
        yield read_table(tokens, name)


def score(
    groups: ray.data.Dataset, store: ReferenceStore, settings: ScorerSettings, config: ReferenceConfig, gpus: float
) -> Iterator[Granule]:
    """Score all completions that the store lacks, streaming, on a pool of engines; yields progress as granules end."""
    # Cut to granules between reading and scoring: it keeps the two apart, so that CPUs tokenize ahead of the engines.
    granules = groups.repartition(target_num_rows_per_block=config.groups_per_granule)
    results = granules.map_batches(
        ScoringActor,
        fn_constructor_kwargs={"store": store, "settings": settings},
        batch_size=config.groups_per_granule,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=config.replicas),
        num_cpus=config.cpus_per_replica,
        num_gpus=gpus or None,
    )
    for row in results.iter_rows():
        yield Granule(**row)


class ScoringActor:
    """One engine of the pool. It starts with the first sequence that the store lacks."""

    def __init__(self, store: ReferenceStore, settings: ScorerSettings) -> None:
        self._store, self._settings = store, settings
        self._index = store.index()
        self._scorer: Scorer | None = None

    def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        began = time.monotonic()
        missing: dict[bytes, ScoreRequest] = {}
        found = 0
        for g, row in enumerate(batch.select(["prompt_ids", "completion_ids"]).to_pylist()):
            prompt = np.array(row["prompt_ids"], np.int32)
            for completion in row["completion_ids"]:
                ids = np.array(completion, np.int32)
                key = self._store.key(prompt, ids)
                if key in self._index:
                    found += 1
                else:
                    missing.setdefault(key, ScoreRequest(g, prompt, ids))
        cached = self._score(missing) if missing else 0
        tokens = sum(len(r.prompt_ids) + len(r.completion_ids) for r in missing.values())
        granule = Granule(len(batch), len(missing), found, tokens, cached, time.monotonic() - began)
        return {name: [value] for name, value in vars(granule).items()}

    def _score(self, missing: dict[bytes, ScoreRequest]) -> int:
        if self._scorer is None:
            self._scorer = start_scorer(self._settings)
        before = self._scorer.cached_tokens
        name = self._store.append(list(missing), self._scorer.score(list(missing.values())))
        self._index.add(name, list(missing))
        return self._scorer.cached_tokens - before


def start_scorer(settings: ScorerSettings) -> Scorer:
    """Start the engine that the recipe names."""
    if settings.engine == "vllm":
        from .vllm_scorer import VllmScorer

        return VllmScorer(settings)
    from .trainer_scorer import TrainerScorer

    return TrainerScorer(settings)


def join(
    tokens: Artifact, store: ReferenceStore, staging: Staging, provenance: Provenance, figures: dict[str, Any]
) -> Artifact:
    """Join the store to every group by key, part by part in parallel, and commit the artifact `reference`.

    Raises:
        ArtifactError: a completion has no log-probs, or not as many as it has tokens.
    """
    parts = token_parts(tokens)
    names = ray.data.from_items([{"name": n} for n in parts], override_num_blocks=len(parts))
    segments = tuple(store.segments())
    joined = names.map_batches(
        _join_parts,  # pyright: ignore[reportArgumentType] - Ray types `fn` as if there were no fn_kwargs
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"tokens": tokens, "store": store, "segments": segments, "staging": staging},
    )
    entries = [FileEntry.model_validate_json(row["entry"]) for row in joined.iter_rows()]
    rows = {"groups": sum(e.rows or 0 for e in entries)}
    return provenance.commit(staging, entries, rows=rows, figures=figures)


@functools.lru_cache(maxsize=1)
def _index(store: ReferenceStore, segments: tuple[str, ...]) -> StoreIndex:
    index = StoreIndex(store.partition)
    index.add_segments(segments)
    return index


def _join_parts(
    batch: pa.Table, tokens: Artifact, store: ReferenceStore, segments: tuple[str, ...], staging: Staging
) -> dict[str, list[str]]:
    return {
        "entry": [
            join_part(name, tokens, store, _index(store, segments), staging).model_dump_json()
            for name in batch["name"].to_pylist()
        ]
    }


def join_part(name: str, tokens: Artifact, store: ReferenceStore, index: StoreIndex, staging: Staging) -> FileEntry:
    """Write the reference part that belongs to one tokens part: the same groups in the same order."""
    rows = read_table(tokens, name, ["group_id", "prompt_ids", "completion_ids"]).to_pylist()
    keys = [[store.key(row["prompt_ids"], c) for c in row["completion_ids"]] for row in rows]
    values = index.fetch([key for group in keys for key in group])
    for row, group in zip(rows, keys, strict=True):
        for completion, key in zip(row["completion_ids"], group, strict=True):
            if len(values[key]) != len(completion):
                raise ArtifactError(
                    f"{len(values[key])} log-probs for a completion of {len(completion)} tokens",
                    where=store.partition.uri,
                    fix="delete this directory of the store; it is made again",
                )
    table = pa.table(
        {"group_id": [r["group_id"] for r in rows], "token_logps": [[values[k] for k in g] for g in keys]},
        schema=REFERENCE,
    )
    return staging.write(name, parquet_bytes(table), rows=len(table))
