"""The stage without engines: which parts are scored, how the account adds up, and when too many groups are left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.cluster.resources import Resources
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.config.train import TrainConfig
from dpo_ray.errors import ArtifactError, DataError
from dpo_ray.reference import stage
from dpo_ray.reference.granule import Scored, Unscored
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.stage import ScoringTally, check_unscored, token_parts


def test_the_parts_of_every_split_are_scored_and_nothing_else(tmp_path: Path) -> None:
    staging = ArtifactStore(Storage(tmp_path)).begin("prepare", "k", "run")
    parts = ["train/0.parquet", "train/1.parquet", "eval_a/0.parquet", "eval_b/0.parquet"]
    entries = [staging.write(name, b"x") for name in ("quarantine/0.parquet", *parts[::-1])]
    rows = {"eval_b/admitted": 1, "eval_a/admitted": 1, "train/admitted": 2, "train/rows_in": 2}
    tokens = Provenance(1, {}, {}, {}).commit(staging, entries, rows=rows, figures={})
    assert token_parts(tokens) == parts


def left_out(*numbers: int) -> tuple[Unscored, ...]:
    return tuple(Unscored(bytes([n]) * 16, "no_log_probs", "they are NaN") for n in numbers)


def test_granules_add_up() -> None:
    account = ScoringTally(groups=40)
    account.add(Scored(10, 20, 3000, 600, 2, 1.5, "engine 1"))
    account.add(Scored(10, 18, 3000, 0, 0, 0.5, "engine 2", left_out(1)))
    account.add(Scored(1, 0, 0, 0, 0, 0.0, "engine 3", left_out(2)))  # a group that killed engines: it scored nothing
    assert account.done == 21
    assert account.figures() == {
        "sequences": 38,
        "found": 0,
        "tokens": 6000,
        "cached_tokens": 600,
        "rescored": 2,
        "seconds": 2.0,
        "tokens_per_second": 3000.0,
        "engines": 2,
    }
    assert set(account.unscored) == {bytes([1]) * 16, bytes([2]) * 16}
    assert "3,000 tokens/s per engine, 10% of the tokens cached" in account.describe()


def test_as_many_groups_may_be_left_out_as_the_recipe_allows() -> None:
    account = ScoringTally(groups=100)
    account.add(Scored(5, 0, 0, 0, 0, 0.0, "engine 1", left_out(1, 2)))
    check_unscored(account, 0.02)
    with pytest.raises(DataError) as refused:
        check_unscored(account, 0.019)
    assert "2 of 100 groups" in refused.value.what
    assert "1.9%" in refused.value.what
    assert "they are NaN" in refused.value.what
    assert "data.max_quarantined_fraction" in refused.value.fix


def test_nothing_may_be_left_out_where_the_recipe_says_so() -> None:
    account = ScoringTally(groups=100)
    check_unscored(account, 0.0)
    account.add(Scored(1, 0, 0, 0, 0, 0.0, "engine 1", left_out(1)))
    with pytest.raises(DataError):
        check_unscored(account, 0.0)


class RefusingPool:
    """A pool whose store cannot be written."""

    ready = size = 1

    def load(self, settings: object, store: object) -> None:
        pass

    def run(self, granules: Iterator[None]) -> Iterator[Scored]:
        next(granules)
        raise ArtifactError("cannot write: Read-only file system")
        yield


def test_an_error_closes_the_look_up_while_ray_is_still_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = []

    def look_up(*_: object) -> Iterator[None]:
        try:
            yield None
        finally:
            closed.append(True)

    monkeypatch.setattr(stage, "look_up_all", look_up)
    staging = ArtifactStore(Storage(tmp_path)).begin("prepare", "k", "run")
    entries = [staging.write("train/0.parquet", b"x")]
    tokens = Provenance(1, {}, {}, {}).commit(staging, entries, rows={"train/admitted": 1}, figures={})
    unused: Any = None
    with pytest.raises(ArtifactError) as raised:
        stage.score(
            tokens,
            unused,
            unused,
            ReferenceConfig(),
            TrainConfig(),
            Resources("engines", 1.0),
            0.0,
            lambda done, text: None,
            lambda text: None,
            cast("EnginePool", RefusingPool()),
        )
    assert raised.tb is not None  # which keeps the generator alive, as it does until the command has printed its error
    assert closed == [True]
