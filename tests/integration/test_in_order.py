"""Scoring in the order of the steps, on Ray's tasks, with a stand-in for the engines: what is written, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.schemas import TOKENS, splits
from dpo_ray.errors import ArtifactError
from dpo_ray.reference import stage as reference_stage
from dpo_ray.reference.granule import Scored, Unscored
from dpo_ray.reference.store.store import Numerics, ReferenceStore
from dpo_ray.reference.streaming import InOrder, Stopped, UnscorableError
from dpo_ray.schedule import files
from dpo_ray.schedule import stage as schedule_stage
from dpo_ray.schedule.build import Packing
from dpo_ray.schedule.files import parse_file_name
from dpo_ray.schedule.streaming_order import deal_turns

# 40 groups, 5 a step, 3 epochs: 24 steps in buckets of 4, 8 and 12, and most groups in two or three of them.
TRAIN = TrainConfig(workers=2, groups_per_step=5, epochs=3, tokens_per_micro_batch=200, eval_every_steps=4)
GRANULE_GROUPS = 6

pytestmark = pytest.mark.usefixtures("ray_cluster")


def begin(root: Path, stage: str) -> Staging:
    return ArtifactStore(Storage(root / "artifacts")).begin(stage, "k", "run")


def tokens_of(root: Path, train: int = 40, heldout: int = 7) -> Artifact:
    rng = np.random.default_rng(0)

    def row(number: int) -> dict:
        completions = [rng.integers(5, 100, rng.integers(1, 9)).tolist() for _ in range(2)]
        return {
            "group_id": number.to_bytes(16, "big"),
            "source": "made",
            "prompt_ids": [number // 2, 1],  # every other group shares its prompt with the one before
            "completion_ids": completions if number % 10 else [[7, 2], [8, 2]],  # some are in several groups
            "scores": [1.0, 0.0],
            "chosen": [0],
            "rejected": [1],
            "preference_probability": 1.0,
            "weight": 1.0,
        }

    staging, entries = begin(root, "prepare"), []
    parts = {"train/0": range(train // 3), "train/1": range(train // 3, train), "eval/0": range(100, 100 + heldout)}
    for name, numbers in parts.items():
        table = pa.Table.from_pylist([row(n) for n in numbers], schema=TOKENS)
        entries.append(staging.write(f"{name}.parquet", parquet_bytes(table), rows=len(table)))
    rows = {"train/admitted": train, "eval/admitted": heldout}
    return Provenance(1, {}, {}, {}).commit(staging, entries, rows=rows, figures={})


def store_of(root: Path) -> ReferenceStore:
    return ReferenceStore(Storage(root / "store"), "m" * 16, Numerics("vllm", "1", "cpu", "float32", "float32"))


def score(store: ReferenceStore, granule: pa.Table) -> int:
    """Commit log-probs for every completion, computed from its key; return the number of completions."""
    keys = store.keys(granule)
    lengths = [len(ids) for group in granule["completion_ids"].to_pylist() for ids in group]
    seeds = [int.from_bytes(key.tobytes()[:4]) for key in keys]
    store.append(keys, [-np.random.default_rng(s).random(n, np.float32) for s, n in zip(seeds, lengths, strict=True)])
    return len(keys)


class Engines:
    """Stands in for the pool: takes three granules at a time, answers the newest and the oldest in turn, some in pieces.

    It keeps the last answer until `may_end`, and dies after `most` sequences.
    """

    def __init__(
        self, store: ReferenceStore, most: int | None = None, may_end: Callable[[], object] = lambda: None
    ) -> None:
        self._store, self._most, self._may_end = store, most, may_end
        self.granules: list[pa.Table] = []
        self.sequences = 0

    def run(self, granules: Iterable[ray.ObjectRef]) -> Iterator[Scored]:
        source, taken = iter(granules), []
        while True:
            while len(taken) < 3 and (ref := next(source, None)) is not None:
                taken.append((len(self.granules), ref))
                self.granules.append(ray.get(ref))
            if not taken:
                return
            if len(taken) == 1:
                self._may_end()
            number, _ = taken.pop(-1 if len(self.granules) % 2 else 0)
            table = self.granules[number]
            for piece in (table.slice(0, 1), table.slice(1)) if number % 2 else (table,):
                count = score(self._store, piece) if len(piece) else 0
                self.sequences += count
                yield Scored(len(piece), count, count, 0, 0, 0.0, "engine 1", granule=number)
                if self._most is not None and self.sequences >= self._most:
                    raise RuntimeError("killed")


def in_order(
    tokens: Artifact,
    store: ReferenceStore,
    staging: Staging,
    scratch: Path,
    announce: Callable[[list[FileEntry]], None],
    train: TrainConfig = TRAIN,
    start_step: int = 0,
    on_lookup: Callable[[int, int], None] = lambda found, known: None,
) -> InOrder:
    scratch.mkdir()
    orders = schedule_stage.order_splits(tokens, train, 0)
    sources = [(o.split, [partial(read_table, tokens, n) for n in o.parts], o.steps, o.groups) for o in orders]
    turns = deal_turns(sources, start_step, train.eval_every_steps, scratch)
    packing = Packing(train.workers, train.tokens_per_micro_batch)
    return InOrder(turns, store, GRANULE_GROUPS, 1, packing, staging, announce, on_lookup)  # pyright: ignore[reportArgumentType]


def ahead(root: Path, tokens: Artifact, train: TrainConfig = TRAIN) -> Artifact:
    """Make the schedule as `ahead` does, from a store of its own."""
    store = store_of(root)
    for split in splits(tokens):
        for name in tokens.names(f"{split}/"):
            score(store, read_table(tokens, name))
    account = reference_stage.ScoringTally(0)
    reference = reference_stage.join(tokens, store, account, begin(root, "reference"), Provenance(1, {}, {}, {}))
    return schedule_stage.run(tokens, reference, train, 0, begin(root, "schedule"), Provenance(1, {}, {}, {}))


def digests(entries: Iterable[FileEntry]) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in entries}


def test_the_files_are_those_of_ahead_and_come_in_the_order_of_reading(tmp_path: Path) -> None:
    tokens, store = tokens_of(tmp_path), store_of(tmp_path)
    announced: list[tuple[str, int]] = []
    scored_by_then: list[int] = []
    first_is_announced = threading.Event()
    engines = Engines(store, may_end=partial(first_is_announced.wait, 60))

    def announce(entries: list[FileEntry]) -> None:
        places = {(split, first) for split, _, first in (parse_file_name(e.name) for e in entries)}
        assert len(entries) == len(places) * TRAIN.workers
        announced.extend(places)
        scored_by_then.append(engines.sequences)
        first_is_announced.set()

    work = in_order(tokens, store, begin(tmp_path, "schedule"), tmp_path / "scratch", announce)
    total = sum(scored.groups for scored in work.run(engines.run, threading.Event()))
    assert announced == [("train", 0), ("eval", 0), ("train", 4), ("train", 12)]
    assert total == 47  # each group once, though most are in several buckets
    assert scored_by_then[0] < scored_by_then[-1] == engines.sequences == 94
    assert digests(work.entries()) == digests(ahead(tmp_path / "ahead", tokens).manifest.files)
    assert list((tmp_path / "scratch").rglob("*.arrow")) == []


def test_buckets_of_large_steps_are_those_of_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_BUCKET_GROUPS", 32)  # of 5 in a step
    tokens, store = tokens_of(tmp_path), store_of(tmp_path)
    work = in_order(tokens, store, begin(tmp_path, "schedule"), tmp_path / "scratch", lambda entries: None)
    list(work.run(Engines(store).run, threading.Event()))
    expected = ahead(tmp_path / "ahead", tokens)
    assert digests(work.entries()) == digests(expected.manifest.files)
    assert len(expected.names("train/rank-00000/")) == 5  # of 4, 6, 6, 6 and 2 steps
    assert [share.step for share in files.read_steps(expected, "train", 0, 9)] == list(range(9, 24))


def test_groups_that_no_step_holds_are_scored_too(tmp_path: Path) -> None:
    tokens, store = tokens_of(tmp_path), store_of(tmp_path)
    train = TRAIN.model_copy(update={"steps": 3})
    work = in_order(tokens, store, begin(tmp_path, "schedule"), tmp_path / "scratch", lambda entries: None, train)
    engines = Engines(store)
    assert sum(scored.groups for scored in work.run(engines.run, threading.Event())) == 47
    first_train = {ids for table in engines.granules[:3] for ids in table["group_id"].to_pylist()}
    in_steps = schedule_stage.order_splits(tokens, train, 0)[0].steps
    assert {n.to_bytes(16, "big") for step in in_steps for n in step} <= first_train
    assert digests(work.entries()) == digests(ahead(tmp_path / "ahead", tokens, train).manifest.files)


def test_a_rerun_scores_only_what_is_missing_and_begins_with_what_training_reads_next(tmp_path: Path) -> None:
    tokens, store = tokens_of(tmp_path), store_of(tmp_path)
    first = in_order(tokens, store, begin(tmp_path, "schedule"), tmp_path / "one", lambda entries: None)
    killed = Engines(store, most=30)
    with pytest.raises(RuntimeError, match="killed"):
        list(first.run(killed.run, threading.Event()))
    again, announced, found = Engines(store), [], []
    work = in_order(
        tokens,
        store,
        begin(tmp_path, "schedule"),
        tmp_path / "two",
        lambda entries: announced.append(parse_file_name(entries[0].name)[::2]),
        start_step=12,
        on_lookup=lambda completions, groups: found.append((completions, groups)),
    )
    list(work.run(again.run, threading.Event()))
    assert announced == [("train", 12), ("eval", 0), ("train", 0), ("train", 4)]
    assert sum(completions for completions, _ in found) >= killed.sequences
    assert again.sequences <= 94 - killed.sequences
    assert digests(work.entries()) == digests(ahead(tmp_path / "ahead", tokens).manifest.files)


def test_where_all_is_known_no_granule_is_made(tmp_path: Path) -> None:
    tokens, store = tokens_of(tmp_path), store_of(tmp_path)
    for name in ("train/0.parquet", "train/1.parquet", "eval/0.parquet"):
        score(store, read_table(tokens, name))
    engines = Engines(store)
    work = in_order(tokens, store, begin(tmp_path, "schedule"), tmp_path / "scratch", lambda entries: None)
    assert list(work.run(engines.run, threading.Event())) == []
    assert engines.granules == []
    assert len(work.entries()) == 4 * TRAIN.workers


def test_a_group_that_cannot_be_scored_ends_it(tmp_path: Path) -> None:
    tokens, store = tokens_of(tmp_path), store_of(tmp_path)
    work = in_order(tokens, store, begin(tmp_path, "schedule"), tmp_path / "scratch", lambda entries: None)

    def refuse(granules: Iterable[ray.ObjectRef]) -> Iterator[Scored]:
        group = ray.get(next(iter(granules)))["group_id"][0].as_py()
        yield Scored(1, 0, 0, 0, 0, 0.0, "engine 1", (Unscored(group, "no_log_probs", "made"),))

    with pytest.raises(UnscorableError, match="1 groups cannot be scored"):
        list(work.run(refuse, threading.Event()))


def test_it_stops_at_the_next_granule(tmp_path: Path) -> None:
    tokens, store = tokens_of(tmp_path), store_of(tmp_path)
    work, stop = (
        in_order(tokens, store, begin(tmp_path, "schedule"), tmp_path / "s", lambda entries: None),
        threading.Event(),
    )
    answers = work.run(Engines(store).run, stop)
    next(answers)
    stop.set()
    with pytest.raises(Stopped):
        list(answers)


def test_an_error_of_writing_is_raised(tmp_path: Path) -> None:
    tokens, store = tokens_of(tmp_path), store_of(tmp_path)

    def announce(entries: list[FileEntry]) -> None:
        raise ArtifactError("the disk is full")

    work = in_order(tokens, store, begin(tmp_path, "schedule"), tmp_path / "scratch", announce)
    with pytest.raises(ArtifactError, match="the disk is full"):
        list(work.run(Engines(store).run, threading.Event()))
