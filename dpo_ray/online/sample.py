"""The stage `sample`: the engines sample completions for granules (batches) of prompts.

The result of each granule is stored at once, so that an interrupted run does not sample it again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.observe.progress import Bar
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.sampling import SAMPLES, Sampled, Sampling

PROMPTS_WITHOUT = "without"  # name, in the manifest's rows, of the number of prompts on which every engine died


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt and the completions that were sampled for it."""

    key: bytes
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]  # True: with an end-of-turn token; False: by the token limit


def sample(
    pool: EnginePool,
    prompts: pa.Table,
    sampling: Sampling,
    prompts_per_granule: int,
    kept: Storage,
    staging: Staging,
    provenance: Provenance,
    bar: Bar,
) -> Artifact:
    """Sample completions for all prompts, and commit the artifact `sample`.

    Args:
        prompts: table of schema PROMPTS.
        prompts_per_granule: number of prompts that an engine gets at once (a granule).
        kept: where finished granules are stored until the commit. Granules that are stored are not sampled again.
    """
    granules = [prompts.slice(i, prompts_per_granule) for i in range(0, len(prompts), prompts_per_granule)]
    existing = set(kept.list_files())
    todo = [i for i in range(len(granules)) if _name(i) not in existing]
    bar.begin_at(sum(len(g) for i, g in enumerate(granules) if i not in set(todo)))
    tokens, seconds, without = 0, 0.0, 0
    pieces: dict[int, list[Sampled]] = {}
    left = {i: len(granules[i]) for i in todo}
    with closing(pool.sample((ray.put(granules[i]) for i in todo), sampling)) as answers:
        for answer in answers:
            number = todo[answer.granule]
            if isinstance(answer, Sampled):
                pieces.setdefault(number, []).append(answer)
                tokens, seconds, rows = tokens + answer.tokens, seconds + answer.seconds, len(answer.table)
            else:
                without, rows = without + answer.groups, answer.groups
            left[number] -= rows
            if not left[number]:
                kept.write(_name(number), parquet_bytes(_whole(granules[number], pieces.pop(number, []))))
            speed = f"{tokens / seconds:,.0f} tokens/s per engine" if seconds else ""
            bar.advance(rows, f"{speed}, engines {pool.ready}/{pool.size}")
    tables = [pq.read_table(io.BytesIO(kept.read_bytes(_name(i)))) for i in range(len(granules))]
    entries = [staging.write(f"samples/{_name(i)}", parquet_bytes(t), rows=len(t)) for i, t in enumerate(tables)]
    rows = {"prompts": sum(map(len, tables)), PROMPTS_WITHOUT: len(prompts) - sum(map(len, tables))}
    artifact = provenance.commit(staging, entries, rows=rows, figures={"tokens": _count_tokens(tables)})
    kept.delete_tree()
    return artifact


def _name(granule: int) -> str:
    return f"granule-{granule:06d}.parquet"


def _whole(granule: pa.Table, pieces: Sequence[Sampled]) -> pa.Table:
    """Join the results for the pieces of a granule, in the order of the granule's prompts.

    Prompts that were left out, because engines died repeatedly while they sampled for them, are missing in the result.
    """
    table = pa.concat_tables([SAMPLES.empty_table(), *(piece.table for piece in pieces)])
    row = {key: i for i, key in enumerate(table["group_id"].to_pylist())}
    return table.take([row[key] for key in granule["group_id"].to_pylist() if key in row])


def _count_tokens(tables: Sequence[pa.Table]) -> int:
    return sum(len(ids) for t in tables for own in t["completion_ids"].to_pylist() for ids in own)


def read_samples(sampled: Artifact) -> Iterator[SampledPrompt]:
    """Yield each prompt of an artifact `sample`, with its completions."""
    for name in sampled.names("samples/"):
        for row in read_table(sampled, name).to_pylist():
            yield SampledPrompt(
                row["group_id"],
                tuple(row["prompt_ids"]),
                tuple(map(tuple, row["completion_ids"])),
                tuple(row["ended"]),
            )
