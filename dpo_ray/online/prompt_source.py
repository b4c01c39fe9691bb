"""The stage `prompts`: it reads the prompts of `online.prompts`, and tokenizes them like the preference data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.cluster.cpu_work import cpu_labels
from dpo_ray.config.data import ControlCharacters
from dpo_ray.config.sources import Columns
from dpo_ray.data.admission import Rejected
from dpo_ray.data.first_pass import PrepareTask
from dpo_ray.data.formats.catalog import fields_of
from dpo_ray.data.formats.control import with_controls
from dpo_ray.data.formats.messages import prompt_of
from dpo_ray.data.formats.read import text_group
from dpo_ray.data.groups import TextGroup, TokenGroup
from dpo_ray.data.readers.rows import read_batches
from dpo_ray.data.sources import Piece, Shard, pieces
from dpo_ray.data.tokenizing.chat import load_tokenizer, resolved
from dpo_ray.data.tokenizing.template_process import TemplateProcess
from dpo_ray.data.tokenizing.tokenize import tokenize_groups
from dpo_ray.errors import DataError

from .prompts import Prompt

ANSWERS = ("answer", "reference_answer", "ground_truth", "solution")
"""Columns that may contain the reference answer of a prompt. The first one that has a value counts."""

SOURCE = pa.schema([("prompt_ids", pa.list_(pa.int32())), ("answer", pa.string())])
FILE = "prompts.parquet"
STAND_IN = "."  # placeholder for the completion, which rendering requires


def run(shards: Sequence[Shard], task: PrepareTask, staging: Staging, provenance: Provenance) -> Artifact:
    """Read all shards in Ray tasks, and commit the artifact `prompts`: each prompt once, with its reference answer.

    Raises:
        DataError: there are no valid prompts, or the fraction of rows that are not valid prompts is above
            data.max_quarantined_fraction. The error lists the reasons.
    """
    read: Any = ray.remote(_read).options(label_selector=cpu_labels())
    prompts: dict[tuple[int, ...], str | None] = {}
    reasons: Counter[str] = Counter()
    rows = 0
    for table, rejected, count in ray.get([read.remote(shard, task) for shard in shards]):
        reasons.update(rejected)
        rows += count
        for ids, answer in zip(table["prompt_ids"].to_pylist(), table["answer"].to_pylist(), strict=True):
            prompts.setdefault(tuple(ids), answer)
    unsound = sum(reasons.values())
    if not prompts or unsound > task.config.max_quarantined_fraction * rows:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        raise DataError(
            f"{unsound:,} of {rows:,} rows are not valid prompts: {listed or 'there are no rows'}",
            where="online.prompts",
            fix="correct the rows, set columns.prompt to the name of the column of prompts, or raise data.max_quarantined_fraction",
        )
    columns = {"prompt_ids": [list(ids) for ids in prompts], "answer": list(prompts.values())}
    entry = staging.write(FILE, parquet_bytes(pa.table(columns, schema=SOURCE)), rows=len(prompts))
    counts = {"rows_in": rows, "prompts": len(prompts), "quarantined": unsound}
    counts["duplicates"] = rows - unsound - len(prompts)
    return provenance.commit(staging, [entry], rows=counts, figures={"reasons": dict(sorted(reasons.items()))})


def read_prompts(artifact: Artifact) -> list[Prompt]:
    """Read all prompts of an artifact `prompts`, with their reference answers."""
    return [Prompt(tuple(row["prompt_ids"]), row["answer"]) for row in read_table(artifact, FILE).to_pylist()]


def _read(shard: Shard, task: PrepareTask) -> tuple[pa.Table, Counter[str], int]:
    """Read one shard.

    Returns:
        A table of its prompts and reference answers; the number of rows without a valid prompt, by reason; and the
        number of all rows.
    """
    reasons: Counter[str] = Counter()
    ids: list[list[int]] = []
    answers: list[str | None] = []
    count = 0
    with TemplateProcess() as process:
        for rows in _batches(shard, task):
            count += len(rows)
            for row, result in zip(rows, _tokenized(rows, shard, task, process), strict=True):
                if isinstance(result, TokenGroup):
                    ids.append(result.prompt_ids.tolist())
                    answers.append(_answer(row))
                else:
                    reasons[result.reason] += 1
    return pa.table({"prompt_ids": ids, "answer": answers}, schema=SOURCE), reasons, count


def first_prompts(shard: Shard, rows: int, task: PrepareTask) -> tuple[int, int, Counter[str]]:
    """Read the first rows of a shard.

    Returns:
        The number of rows; the number of rows with a reference answer; and the number of rows without a valid prompt, by
        reason.
    """
    batch = [row for _, row in next(read_batches(Piece(shard), rows), [])]
    with TemplateProcess() as process:
        results = _tokenized(batch, shard, task, process)
    answers = sum(isinstance(row, dict) and _answer(row) is not None for row in batch)
    return len(batch), answers, Counter(result.reason for result in results if isinstance(result, Rejected))


def _tokenized(
    rows: Sequence[Any], shard: Shard, task: PrepareTask, process: TemplateProcess
) -> list[TokenGroup | Rejected]:
    tokenizer = load_tokenizer(task.tokenizer_dir)
    template, controls = resolved(task.template, tokenizer), task.config.rules.control_characters
    return tokenize_groups([_text(row, shard, controls) for row in rows], tokenizer, template, task.config, process)


def _batches(shard: Shard, task: PrepareTask) -> Iterator[list[Any]]:
    for piece in pieces(shard):
        for batch in read_batches(piece, task.config.rows_per_part):
            yield [row for _, row in batch]


def _text(row: Any, shard: Shard, controls: ControlCharacters) -> TextGroup | Rejected:
    """Return the prompt of a row, or the reason why the row is rejected.

    The prompt is in the row's column for prompts. In preference data it may instead be contained in the completions.
    """
    if isinstance(row, Rejected):
        return row
    if not isinstance(row, dict):
        return Rejected("NOT_AN_OBJECT", type(row).__name__)
    fields = fields_of(row, "unpaired", Columns(prompt=shard.columns.prompt))
    try:
        if fields.get("prompt") is None and _holds_pairs(row):
            group = text_group(row, shard.row_format, shard.columns, shard.criteria, controls)
            return TextGroup(group.prompt, (STAND_IN,), (1.0,), chosen=(), rejected=(), messages=group.messages)
        return with_controls(TextGroup(prompt_of(fields), (STAND_IN,), (1.0,), chosen=(), rejected=()), controls)
    except Rejected as rejected:
        return rejected


def _holds_pairs(row: Iterable[str]) -> bool:
    return "chosen" in row


def _answer(row: Mapping[str, Any]) -> str | None:
    value = next((row[name] for name in ANSWERS if row.get(name) is not None), None)
    return None if value is None else str(value)
