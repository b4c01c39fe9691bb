"""Building of a run's data page from the artifact of `prepare`, for the report and for `dpo-ray inspect data`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.places import artifact_store, run_storage
from dpo_ray.data.admission import REASONS
from dpo_ray.data.keys import shard_key
from dpo_ray.data.schemas import splits
from dpo_ray.data.stage import SHARD_STAGE
from dpo_ray.data.statistics import bin_edges, merged, summary
from dpo_ray.data.tokenizing.chat import load_tokenizer
from dpo_ray.errors import DpoRayError
from dpo_ray.models.load import model_directory
from dpo_ray.run.planning import Plan

from .data_page import DataPage, Example, LeftOut, Measured, RowCounts, render_data_page
from .histograms import Counted
from .samples import group_text, quarantine_examples, rendered_samples

DATA_PAGE = "data.html"
MAX_SOURCES = 40  # sources of a split that are shown separately; the counts of other sources are added up
EXAMPLES = 3  # per reason


def data_page(plan: Plan, tokens: Artifact, samples: int) -> DataPage:
    """Build the data page from the artifact of `prepare`. `samples` is the number of groups to show as text."""
    tokenizer, note = tokenizer_of(plan)
    data, accounts = plan.recipe.data, tokens.manifest.figures["accounts"]
    return DataPage(
        sources=[row for split in splits(tokens) for row in shown_sources(accounts, split)],
        splits=[_row_counts([a for a in accounts if a["split"] == split], split, "") for split in splits(tokens)],
        reasons=_reasons(plan, tokens, tokenizer),
        measured=[m for split in splits(tokens) for m in _measured(tokens, split)],
        samples=rendered_samples(tokens, tokenizer, samples) if tokenizer is not None else [],
        samples_note=note or "No samples were requested.",
        max_quarantined_fraction=data.max_quarantined_fraction,
        max_length_tokens=data.max_length_tokens,
    )


def write_data_page(plan: Plan, tokens: Artifact, page: DataPage) -> str:
    """Write data.html into the run's directory, unless it is up to date, and return its path."""
    rows = tokens.manifest.rows
    admitted = ", ".join(f"{rows[f'{split}/admitted']:,} {split}" for split in splits(tokens))
    html = render_data_page(
        page,
        name=plan.recipe.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(tokens.manifest.created_unix_seconds)),
        what=f"Preference groups for {plan.recipe.model.path}: {admitted}.",
    ).encode()
    place = run_storage(plan.recipe)
    if not (place.exists(DATA_PAGE) and place.read_bytes(DATA_PAGE) == html):
        place.write(DATA_PAGE, html)
    return place.full_path(DATA_PAGE)


def tokenizer_of(plan: Plan) -> tuple[PreTrainedTokenizerBase | None, str]:
    """Return the run's tokenizer and "". If the model is gone, return None and the reason.

    The page can be built without a tokenizer; the page then shows the reason instead of samples.
    """
    try:
        return load_tokenizer(str(model_directory(plan.recipe.model))), ""
    except DpoRayError as error:
        return None, f"Not decoded: {error}"


def shown_sources(accounts: Sequence[Mapping[str, Any]], split: str) -> list[RowCounts]:
    """Return the row counts of each source. If there are very many sources, add up the counts of the small ones."""
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for account in accounts:
        if account["split"] == split:
            by_source.setdefault(account["source"], []).append(account)
    shown = _largest({name: sum(a["rows_in"] for a in mine) for name, mine in by_source.items()})
    rows = [_row_counts(by_source[name], split, name) for name in shown]
    if others := [a for name, mine in by_source.items() if name not in shown for a in mine]:
        rows.append(_row_counts(others, split, f"{len(by_source) - len(shown):,} other sources"))
    return rows


def _largest(sizes: Mapping[str, int]) -> list[str]:
    """Return the names of the largest sources, in their original order."""
    kept = set(sorted(sizes, key=lambda name: -sizes[name])[:MAX_SOURCES])
    return [name for name in sizes if name in kept]


def _row_counts(accounts: Sequence[Mapping[str, Any]], split: str, source: str) -> RowCounts:
    reasons = Counter[str]()
    for account in accounts:
        reasons.update(account["reasons"])
    kinds = Counter[str]()
    for reason, rows in reasons.items():
        kinds[REASONS[reason].kind] += rows
    return RowCounts(
        split=split,
        source=source,
        rows_in=sum(a["rows_in"] for a in accounts),
        admitted=sum(a["admitted"] for a in accounts),
        faults=kinds["fault"],
        rules=kinds["rule"],
        duplicates=sum(a["duplicates"] for a in accounts),
        near_duplicates=sum(a["near_duplicates"] for a in accounts),
    )


def _reasons(plan: Plan, tokens: Artifact, tokenizer: PreTrainedTokenizerBase | None) -> list[LeftOut]:
    counts: dict[str, Counter[str]] = {}
    for account in tokens.manifest.figures["accounts"]:
        for reason, rows in account["reasons"].items():
            counts.setdefault(reason, Counter())[f"{account['split']} · {account['source']}"] += rows
    examples = quarantine_examples(tokens, EXAMPLES)
    return [
        LeftOut(
            reason=reason,
            kind=REASONS[reason].kind,
            meaning=REASONS[reason].meaning,
            rows=sources.total(),
            sources=dict(sources.most_common()),
            examples=[_example(plan, row, tokenizer) for row in examples.get(reason, [])],
        )
        for reason, sources in sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    ]


def _example(plan: Plan, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Example:
    """Build the example of a row that was left out, with its position in the file, counted from 1.

    If a rule over all rows left out a group, its text is decoded from the artifact of its shard.
    """
    index, part = PurePosixPath(row["part"]).name.split("-", 1)
    shard, config = next(
        (shard, config)
        for shard, config in zip(plan.checked.shards, plan.shard_configs, strict=True)
        if (shard.split, shard.index) == (row["split"], int(index))
    )
    text = row["sample"]
    if not text and row["detail"].startswith("group ") and tokenizer is not None:
        artifact = artifact_store(plan.recipe).find(SHARD_STAGE, shard_key(config))
        group_id = bytes.fromhex(row["detail"].removeprefix("group "))
        text = group_text(artifact, part, group_id, tokenizer) if artifact is not None else ""
    file = "" if shard.kind in ("hub", "synthetic") else PurePosixPath(shard.location).name
    named = " · ".join(dict.fromkeys(name for name in (row["split"], row["source"], file) if name))
    return Example(f"{named}, row {row['ordinal'] + 1:,}", row["detail"], text)


def _measured(tokens: Artifact, split: str) -> Iterator[Measured]:
    """Yield the statistics of a whole split, then the statistics of each of its largest sources."""
    by_source: dict[str, Any] = tokens.manifest.figures["statistics"].get(split, {})
    by_source = {name: s for name, s in by_source.items() if s["groups"]}
    if not by_source:
        return
    yield measured_of(split, "", merged(by_source.values()))
    for name in _largest({name: s["groups"] for name, s in by_source.items()}):
        yield measured_of(split, name, by_source[name])


def measured_of(split: str, source: str, statistics: Mapping[str, Any]) -> Measured:
    """Compute the summary and the histograms that the page shows from the statistics of a source or a split."""
    counted = {name: _counted(statistics[name]) for name in ("prompt", "chosen", "rejected", "completion")}
    return Measured(split, source, summary(statistics), {**counted, "difference": _difference(statistics)})


def _counted(histogram: Mapping[str, Any]) -> Counted:
    counts = np.array(histogram["bins"], np.int64)
    return Counted(bin_edges(len(counts)), counts, histogram["sum"] / max(1, histogram["count"]))


def _difference(statistics: Mapping[str, Any]) -> Counted:
    """Build one histogram of chosen minus rejected length, from two histograms of the positive and negative differences.

    Pairs of equal length are counted at 0.
    """
    longer, shorter, pairs = statistics["chosen_longer_by"], statistics["rejected_longer_by"], statistics["pairs"]
    right, left = (np.array(h["bins"], np.int64) for h in (longer, shorter))
    same = pairs - longer["count"] - shorter["count"]
    # Bin 0 is for zeros and is empty in both histograms. Values are whole numbers: -9 and -8 lie from -9 to below -7.
    counts = np.concatenate([left[:0:-1], [same], right[1:]])
    edges = np.concatenate([1 - bin_edges(len(left))[:0:-1], bin_edges(len(right))[1:]])
    return Counted(edges, counts, (longer["sum"] - shorter["sum"]) / max(1, pairs))
