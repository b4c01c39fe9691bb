"""The stage `prepare`: shards -> preference groups -> token ids, and an account of every row."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.config.data import DataConfig
from dpo_ray.errors import DataError

from .admission import DETAIL_CHARACTERS, REASONS, Rejected, printable, sample_of
from .chat import load_tokenizer, resolve_template
from .groups import TextGroup, text_group
from .rows import read_rows
from .sources import Shard
from .tokenize import TokenGroup, tokenize_groups
from .tokens import QUARANTINE, TOKENS, parquet_bytes, read_table, tokens_table

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class PrepareTask:
    """What a worker needs to prepare shards. Pickles."""

    tokenizer_dir: str
    template: str
    config: DataConfig
    staging: Staging


def tokenized(shards: Sequence[Shard], task: PrepareTask) -> ray.data.Dataset:
    """Describe the streaming execution: each shard is read, tokenized and written to the staging place in parts.

    The data set's blocks are the parts' rows (the tokens schema, and `split`), so that scorers can take them as they
    come. Nothing runs until it is consumed. A task that runs twice writes the same names with the same bytes.
    """
    by_index = ray.data.from_items([{"shard": i} for i in range(len(shards))], override_num_blocks=len(shards))
    return by_index.map_batches(
        _prepare_shards,  # pyright: ignore[reportArgumentType] - Ray types `fn` as if there were no fn_kwargs
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        fn_kwargs={"shards": tuple(shards), "task": task},
    )


def _prepare_shards(batch: pa.Table, shards: Sequence[Shard], task: PrepareTask) -> Iterator[pa.Table]:
    for index in batch["shard"].to_pylist():
        yield from prepare_shard(shards[index], task)


def prepare_shard(shard: Shard, task: PrepareTask) -> Iterator[pa.Table]:
    """Prepare one shard: write its parts, yield their rows, and leave its account beside them."""
    entries: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    rows_in = admitted = 0
    for part, rows in enumerate(_batched(read_rows(shard), task.config.rows_per_part)):
        name = f"{shard.split}/{shard.index:05d}-{part:05d}.parquet"
        groups, quarantined = _split(rows, shard, task)
        table = tokens_table(groups, shard.name)
        entries.append(task.staging.write(name, parquet_bytes(table), rows=len(table)).model_dump())
        if quarantined:
            bad = pa.Table.from_pylist(quarantined, schema=QUARANTINE)
            entries.append(task.staging.write(f"quarantine/{name}", parquet_bytes(bad), rows=len(bad)).model_dump())
        rows_in, admitted = rows_in + len(rows), admitted + len(table)
        reasons.update(row["reason"] for row in quarantined)
        yield table.append_column("split", pa.array([shard.split] * len(table), pa.string()))
    account = {
        "split": shard.split,
        "index": shard.index,
        "source": shard.name,
        "rows_in": rows_in,
        "admitted": admitted,
        "reasons": dict(reasons),
        "entries": entries,
    }
    task.staging.write(_account_name(shard), json.dumps(account).encode())
    if not entries:  # an empty shard must still yield a block with the schema
        yield TOKENS.append(pa.field("split", pa.string())).empty_table()


def _account_name(shard: Shard) -> str:
    return f"account/{shard.split}-{shard.index:05d}.json"


def _batched(rows: Iterator[tuple[int, Any]], size: int) -> Iterator[list[tuple[int, Any]]]:
    batch: list[tuple[int, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _split(
    rows: Sequence[tuple[int, Any]], shard: Shard, task: PrepareTask
) -> tuple[list[TokenGroup], list[dict[str, Any]]]:
    """Tokenize a part's rows; return the sound groups, and a quarantine row for each of the others."""
    config, tokenizer = task.config, _tokenizer(task.tokenizer_dir)
    # `auto` where the plan was made without the model's files at hand
    template = resolve_template("auto", tokenizer) if task.template == "auto" else task.template
    texts = [_text_group(row, shard) for _, row in rows]
    results = tokenize_groups(texts, tokenizer, template, config.max_length_tokens, config.truncation)
    groups, quarantined = [], []
    for (ordinal, row), result in zip(rows, results, strict=True):
        if isinstance(result, TokenGroup):
            groups.append(result)
        else:
            sample = result.detail if isinstance(row, Rejected) else row
            quarantined.append(
                {
                    "reason": result.reason,
                    "detail": printable(result.detail, DETAIL_CHARACTERS),
                    "split": shard.split,
                    "source": shard.name,
                    "ordinal": ordinal,
                    "sample": sample_of(sample),
                }
            )
    return groups, quarantined


@functools.lru_cache(maxsize=2)
def _tokenizer(tokenizer_dir: str):
    return load_tokenizer(tokenizer_dir)


def _text_group(row: Any, shard: Shard) -> TextGroup | Rejected:
    if isinstance(row, Rejected):
        return row
    if not isinstance(row, dict):
        return Rejected("NOT_AN_OBJECT", f"{type(row).__name__}")
    try:
        return text_group(row, shard.row_format, shard.columns)
    except Rejected as rejected:
        return rejected


def finish(staging: Staging, shards: Sequence[Shard], provenance: Provenance) -> Artifact:
    """Drop duplicates, add up the account, and commit the tokens artifact.

    Raises:
        DataError: no row of a split was admitted.
    """
    accounts = [json.loads(staging.storage.read_bytes(_account_name(s))) for s in shards]
    files: list[FileEntry] = []
    seen: dict[str, set[bytes]] = {split: set() for split in SPLITS}
    for account in accounts:
        account["duplicates"] = 0
        for entry in (FileEntry.model_validate(e) for e in account.pop("entries")):
            if entry.name.startswith("quarantine/"):
                files.append(entry)
                continue
            kept, duplicates = _without_duplicates(staging, entry, seen[account["split"]])
            account["duplicates"] += duplicates
            files += [kept] if kept.rows else []
        account["admitted"] -= account["duplicates"]
        account["quarantined"] = sum(account["reasons"].values())
    rows = {
        f"{split}/{what}": sum(a[what] for a in accounts if a["split"] == split)
        for split in SPLITS
        for what in ("rows_in", "admitted", "quarantined", "duplicates")
    }
    for split in SPLITS:
        if not rows[f"{split}/admitted"] and (split == "train" or any(s.split == split for s in shards)):
            raise _none_admitted(split, accounts)
    return provenance.commit(staging, files, rows=rows, figures={"accounts": accounts})


def _none_admitted(split: str, accounts: Sequence[dict[str, Any]]) -> DataError:
    mine = [a for a in accounts if a["split"] == split]
    reasons = sum((Counter(a["reasons"]) for a in mine), Counter())
    listed = "; ".join(f"{n} {reason} ({REASONS[reason]})" for reason, n in reasons.most_common(5))
    return DataError(
        f"none of {sum(a['rows_in'] for a in mine)} rows was admitted: {listed or 'the data is empty'}",
        where=f"data.{split}",
        fix=f"check data.{split}'s format and columns against the first rows of the data",
    )


def _without_duplicates(staging: Staging, entry: FileEntry, seen: set[bytes]) -> tuple[FileEntry, int]:
    """Drop groups that an earlier part (or row) of the split holds; rewrite the part only if it has any."""
    table = read_parquet_bytes(staging.storage.read_bytes(entry.name), ["group_id"])
    keep = []
    for group_id in table["group_id"].to_pylist():
        keep.append(group_id not in seen)
        seen.add(group_id)
    duplicates = keep.count(False)
    if not duplicates:
        return entry, 0
    kept = read_parquet_bytes(staging.storage.read_bytes(entry.name)).filter(pa.array(keep))
    return staging.write(entry.name, parquet_bytes(kept), rows=len(kept)), duplicates


def read_parquet_bytes(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Decode a part that lies in the staging place."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.BufferReader(data)).read(columns=list(columns) if columns else None)


def quarantine_examples(tokens: Artifact, per_reason: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Return the first quarantined rows of each reason, for the report."""
    examples: dict[str, list[dict[str, Any]]] = {}
    for name in tokens.names("quarantine/"):
        for row in read_table(tokens, name).to_pylist():
            kept = examples.setdefault(row["reason"], [])
            if len(kept) < per_reason:
                kept.append(row)
    return examples
