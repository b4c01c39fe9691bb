"""The second pass: applies the rules over all rows, and merges the shards' artifacts into the tokens artifact.

The tokens artifact also records how many rows of each shard were admitted, quarantined or dropped as duplicates.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.config.data import DataConfig
from dpo_ray.errors import DataError

from .admission import ADVICE, REASONS
from .mismatched import with_mismatched
from .rules import Candidates, Outcome, candidates, select
from .schemas import QUARANTINE, TOKENS
from .sources import Shard, field_of
from .statistics import measure, merged

READERS = 8  # threads: object stores are slow to answer, but answer many requests concurrently
_DUPLICATES = (Outcome.DUPLICATE, Outcome.NEAR_DUPLICATE)


@dataclass(frozen=True)
class PreparedShard:
    """A shard (input file) of the recipe, and the artifact with the groups that the first pass made from it."""

    shard: Shard
    artifact: Artifact

    def parts(self) -> list[ShardPart]:
        """List the parts of the artifact. A part has a file of groups, a file of quarantined rows, or both."""
        files: dict[str, dict[str, FileEntry]] = {}
        for entry in self.artifact.manifest.files:
            kind, part = entry.name.split("/", 1)
            files.setdefault(part, {})[kind] = entry
        piece_rows = self.artifact.manifest.figures["piece_rows"]
        first_rows = [0, *itertools.accumulate(piece_rows)]
        return [
            ShardPart(self.shard, part.removesuffix(".parquet"), first_rows[int(part.split("-")[0])], self._only(kinds))
            for part, kinds in sorted(files.items())
        ]

    def _only(self, kinds: Mapping[str, FileEntry]) -> Artifact:
        """Build an artifact with only the files of one part, so that it is small enough to send to a task."""
        manifest = self.artifact.manifest.model_copy(update={"files": tuple(kinds.values()), "figures": {}})
        return Artifact(manifest, self.artifact.storage)


@dataclass(frozen=True)
class ShardPart:
    """One part of the artifact of a shard (input file): some of its groups and quarantined rows. It can be pickled."""

    shard: Shard
    name: str  # PIECE-PART
    first_row: int  # the number of the piece's first row within the shard
    artifact: Artifact

    def table(self, kind: Literal["groups", "quarantine"], columns: Sequence[str] | None = None) -> pa.Table | None:
        """Read the part's groups or its quarantined rows; return None if there are none."""
        name = f"{kind}/{self.name}.parquet"
        return read_table(self.artifact, name, columns) if self.artifact.names(name) else None

    @property
    def groups(self) -> int:
        """Return how many groups the part has."""
        return sum(entry.rows or 0 for entry in self.artifact.manifest.files if entry.name.startswith("groups/"))


@dataclass(frozen=True)
class PartChoice:
    """One part of a shard, and the decision (`Outcome`) on each of its groups. It can be pickled."""

    part: ShardPart
    outcomes: bytes  # uint8 [groups]


@dataclass(frozen=True)
class MergedPart:
    """The result of merging one part: its files in the tokens artifact, its counts, and its statistics."""

    split: str
    index: int
    source: str
    counts: dict[str, int]
    reasons: dict[str, int]
    statistics: dict[str, Any]
    entries: tuple[FileEntry, ...]


def choose(shards: Sequence[PreparedShard], data: DataConfig) -> list[PartChoice]:
    """Decide which groups are admitted, by the rules over all rows: duplicates, conflicts, leakage, caps, mixture."""
    held_out = [s for s in dict.fromkeys(p.shard.split for p in shards) if s != "train"]
    chosen: list[PartChoice] = []
    prompts: list[np.ndarray] = []
    for split in (*held_out, "train"):  # training comes last, when the held-out prompts are known
        parts = [part for prepared in shards if prepared.shard.split == split for part in prepared.parts()]
        everything = _candidates(parts, with_minhashes=data.rules.near_duplicates is not None)
        sources = data.train if split == "train" else data.eval_sets[split]
        outcomes = select(
            everything,
            np.concatenate(prompts) if split == "train" and prompts else None,
            data.rules,
            [s.max_groups for s in sources],
            [s.weight for s in sources],
        )
        prompts.append(everything.prompt_hashes[outcomes == Outcome.ADMITTED])
        start = 0
        for part in parts:
            stop = start + part.groups
            chosen.append(PartChoice(part, outcomes[start:stop].astype(np.uint8).tobytes()))
            start = stop
    return chosen


def _candidates(parts: Sequence[ShardPart], *, with_minhashes: bool) -> Candidates:
    columns = ["group_id", "prompt_hash", "opposite_id", *(["minhash"] if with_minhashes else [])]
    with ThreadPoolExecutor(READERS) as pool:
        tables = pool.map(lambda part: part.table("groups", columns), parts)
        return candidates((p.shard.source, t) for p, t in zip(parts, tables, strict=True) if t is not None)


def merge_part(choice: PartChoice, staging: Staging, mismatched_tokens: int | None = None) -> MergedPart:
    """Write the admitted groups and the quarantined rows of one part to the tokens artifact.

    Args:
        mismatched_tokens: if set, a completion of another prompt is appended to each group (`mismatched.py`). The prompt
            and this completion may have at most this many tokens.
    """
    part, shard = choice.part, choice.part.shard
    outcomes = np.frombuffer(choice.outcomes, np.uint8)
    name = f"{shard.split}/{shard.index:05d}-{part.name}.parquet"
    entries: list[FileEntry] = []
    groups = part.table("groups")
    admitted = TOKENS.empty_table()
    if groups is not None:
        kept = groups.filter(pa.array(outcomes == Outcome.ADMITTED))
        admitted = kept.append_column("source", pa.repeat(shard.name, len(kept))).select(TOKENS.names)
    if len(admitted):
        written = admitted if mismatched_tokens is None else with_mismatched(admitted, mismatched_tokens)
        entries.append(staging.write(name, parquet_bytes(written), rows=len(admitted)))
    quarantine = _quarantine(part, groups, outcomes)
    if len(quarantine):
        entries.append(staging.write(f"quarantine/{name}", parquet_bytes(quarantine), rows=len(quarantine)))
    duplicates, near = (int((outcomes == d).sum()) for d in _DUPLICATES)
    counts = {
        "rows_in": len(admitted) + len(quarantine) + duplicates + near,
        "admitted": len(admitted),
        "quarantined": len(quarantine),
        "duplicates": duplicates + near,
        "near_duplicates": near,
    }
    reasons = dict(Counter(quarantine["reason"].to_pylist()))
    return MergedPart(shard.split, shard.index, shard.name, counts, reasons, measure(admitted), tuple(entries))


def _quarantine(part: ShardPart, groups: pa.Table | None, outcomes: np.ndarray) -> pa.Table:
    """Collect the rows that were quarantined when the shard was read, and those that a rule over all rows excludes."""
    tables = [t for t in (part.table("quarantine"), _left_out(groups, outcomes)) if t is not None]
    rows = pa.concat_tables(tables) if tables else QUARANTINE.empty_table()
    places = {
        "split": pa.repeat(part.shard.split, len(rows)),
        "source": pa.repeat(part.shard.name, len(rows)),
        "ordinal": pc.add(rows["ordinal"], part.first_row),  # pyright: ignore[reportAttributeAccessIssue]
    }
    for column, values in places.items():
        rows = rows.set_column(rows.schema.get_field_index(column), QUARANTINE.field(column), values)
    return rows.sort_by("ordinal")


def _left_out(groups: pa.Table | None, outcomes: np.ndarray) -> pa.Table | None:
    """Build quarantine rows for the groups that the rules over all rows exclude. Duplicates are not quarantined."""
    rows = np.flatnonzero((outcomes != Outcome.ADMITTED) & ~np.isin(outcomes, _DUPLICATES))
    if groups is None or not len(rows):
        return None
    taken = groups.select(["group_id", "ordinal"]).take(pa.array(rows))
    columns = {
        "reason": [Outcome(o).name for o in outcomes[rows].tolist()],
        "detail": [f"group {group_id.hex()}" for group_id in taken["group_id"].to_pylist()],
        "split": pa.nulls(len(rows), pa.string()),
        "source": pa.nulls(len(rows), pa.string()),
        "ordinal": taken["ordinal"],
        "sample": pa.repeat("", len(rows)),
    }
    return pa.table(columns, schema=QUARANTINE)


def commit_tokens(
    shards: Sequence[PreparedShard], parts: Sequence[MergedPart], staging: Staging, provenance: Provenance
) -> Artifact:
    """Commit the tokens artifact (the output of `prepare`), which consists of all parts.

    Raises:
        DataError: no row of a split was admitted.
    """
    rows, figures = account(shards, parts)
    entries = [entry for part in parts for entry in part.entries]
    return provenance.commit(staging, entries, rows=rows, figures=figures)


def account(shards: Sequence[PreparedShard], parts: Iterable[MergedPart]) -> tuple[dict[str, int], dict[str, Any]]:
    """Add up all parts. Return the row counts, and the manifest's `figures`: counts per shard and statistics per source.

    Raises:
        DataError: no row of a split was admitted.
    """
    accounts = {
        (p.shard.split, p.shard.index): {
            "split": p.shard.split,
            "index": p.shard.index,
            "source": p.shard.name,
            **dict.fromkeys(COUNTS, 0),
            "reasons": Counter[str](),
        }
        for p in shards
    }
    measured: dict[str, dict[str, list[Any]]] = {}
    for part in sorted(parts, key=lambda p: (p.split, p.index)):
        mine = accounts[part.split, part.index]
        mine |= {name: mine[name] + part.counts[name] for name in COUNTS}
        mine["reasons"].update(part.reasons)
        measured.setdefault(part.split, {}).setdefault(part.source, []).append(part.statistics)
    listed = [{**a, "reasons": dict(sorted(a["reasons"].items()))} for _, a in sorted(accounts.items())]
    rows = {
        f"{split}/{what}": sum(a[what] for a in listed if a["split"] == split)
        for split in dict.fromkeys(a["split"] for a in listed)
        for what in COUNTS
        if what != "near_duplicates"
    }
    for split in dict.fromkeys(a["split"] for a in listed):
        if not rows[f"{split}/admitted"]:
            raise DataError(
                f"none of {rows[f'{split}/rows_in']} rows was admitted: {_reasons(listed, split) or 'the data is empty'}",
                where=field_of(split),
                fix=_advice(listed, split, f"check the format and columns of {field_of(split)} against its first rows"),
            )
    statistics = {
        split: {source: merged(parts) for source, parts in sources.items()} for split, sources in measured.items()
    }
    return rows, {"accounts": listed, "statistics": statistics}


COUNTS = ("rows_in", "admitted", "quarantined", "duplicates", "near_duplicates")


def left_out_by_rules(tokens: Artifact, split: str) -> int:
    """Count the rows of a split that are sound, but were quarantined by a rule of the recipe."""
    accounts = tokens.manifest.figures["accounts"]
    return sum(n for _, n in _counts(accounts, split, ("rule",)))


def _counts(accounts: Sequence[Mapping[str, Any]], split: str, kinds: Sequence[str]) -> list[tuple[str, int]]:
    """Count the rows of a split by reason, for the reasons of the given kinds; the most frequent reason is first."""
    counts = sum((Counter(a["reasons"]) for a in accounts if a["split"] == split), Counter[str]())
    return [(reason, n) for reason, n in counts.most_common() if REASONS[reason].kind in kinds]


def _reasons(accounts: Sequence[Mapping[str, Any]], split: str, kinds: Sequence[str] = ("fault", "rule")) -> str:
    counts = _counts(accounts, split, kinds)
    return "; ".join(f"{n:,} {reason} ({REASONS[reason].meaning})" for reason, n in counts[:5])


def _advice(
    accounts: Sequence[Mapping[str, Any]], split: str, default: str, kinds: Sequence[str] = ("fault", "rule")
) -> str:
    """Return the advice for the reason that excluded the most rows of a split, or `default` if there is no such advice."""
    return next((ADVICE.get(reason, default) for reason, _ in _counts(accounts, split, kinds)), default)


def check_quarantined(tokens: Artifact, limit: float) -> None:
    """Check that no split has more unsound rows than data.max_quarantined_fraction allows.

    Raises:
        DataError: a split has too many. The error contains the number of rows by reason, and how to inspect the rows.
    """
    accounts = tokens.manifest.figures["accounts"]
    for split in dict.fromkeys(a["split"] for a in accounts):
        mine = [a for a in accounts if a["split"] == split]
        faults = sum(n for a in mine for reason, n in a["reasons"].items() if REASONS[reason].kind == "fault")
        rows = sum(a["rows_in"] for a in mine)
        if faults > limit * rows:
            raise DataError(
                f"{faults:,} of {rows:,} rows ({faults / rows:.1%}) are unsound, more than the allowed {limit:.1%}: "
                + _reasons(accounts, split, ("fault",)),
                where=field_of(split),
                fix=_advice(mine, split, "correct the data, or `format` and `columns` in the recipe", ("fault",))
                + "; `dpo-ray inspect data RECIPE` shows these rows; or raise data.max_quarantined_fraction",
            )


def broken_shards(tokens: Artifact) -> list[str]:
    """Return a message for each shard (input file) that could not be read to its end. The lost rows of a shard count as one."""
    return [
        f"the shard {a['source']} ({field_of(a['split'])}, file {a['index'] + 1}) is damaged: {reason} "
        f"({REASONS[reason].meaning}); {a['rows_in'] - n:,} rows were read before the damage, and the rows after it are lost"
        for a in tokens.manifest.figures["accounts"]
        for reason, n in a["reasons"].items()
        if reason.startswith("SHARD_")
    ]
