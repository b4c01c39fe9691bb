"""The pool of engines on real Ray: engines that are killed, groups that kill them, groups that have no log-probs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.model import ModelConfig
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.errors import EngineError, InfrastructureError
from dpo_ray.models.load import model_directory
from dpo_ray.reference.granule import Scored, Unscored
from dpo_ray.reference.pool import MAX_FAILED_STARTS, EnginePool
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.store.store import Numerics, ReferenceStore
from tests.helpers.fakes import scorers
from tests.helpers.fakes.scorers import BREAKING, DEADLY, UNSCORABLE, Start, formula, granule
from tests.helpers.role_resources import ENGINE

pytestmark = pytest.mark.usefixtures("ray_cluster")
ray.cloudpickle.register_pickle_by_value(scorers)  # engines' processes do not find the tests' modules

NUMERICS = Numerics("vllm", "0.32.0", "cpu", "float32", "float32")


def store_in(root: Path) -> ReferenceStore:
    return ReferenceStore(Storage(root), "a" * 64, NUMERICS)


def settings() -> ScorerSettings:
    model = str(model_directory(ModelConfig(path="builtin:sentiment_llama")))
    return ScorerSettings("vllm", model, "float32", "cpu", 128, 2048, 0.5, share_prompt=True)


def pool_of(
    store: ReferenceStore, start: Start, events: list[str], replicas: int = 2, max_replicas: int | None = None
) -> EnginePool:
    config = ReferenceConfig(replicas=replicas, max_replicas=max_replicas)
    return EnginePool(settings(), store, config, ENGINE, events.append, start=start)


def granules(*sizes: int, **firsts: int) -> list[pa.Table]:
    """Make granules of groups numbered through; `firsts` is of the second one."""
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *sizes])
    return [
        granule(int(s), n, rng, **(firsts if i == 1 else {}))
        for i, (s, n) in enumerate(zip(starts, sizes, strict=False))
    ]


def run(pool: EnginePool, tables: Sequence[pa.Table]) -> list[Scored]:
    return list(pool.run(ray.put(table) for table in tables))


def sequences(tables: Sequence[pa.Table]) -> list[tuple[list[int], list[int]]]:
    return [(row["prompt_ids"], c) for t in tables for row in t.to_pylist() for c in row["completion_ids"]]


def content(store: ReferenceStore, tables: Sequence[pa.Table]) -> list[list[float]]:
    """Read what the store has of the sequences, and see that it has nothing else."""
    index, keys = store.index(), [store.key(p, c) for p, c in sequences(tables)]
    assert len(index) == len(set(keys))
    return store.fetch(index, keys).to_pylist()


def groups_of(unscored: Sequence[Unscored]) -> list[int]:
    return [int.from_bytes(u.group_id, "big") for u in unscored]


@pytest.mark.slow
def test_a_killed_engine_costs_at_most_its_granule(tmp_path: Path) -> None:
    """Real vLLM: the store ends as an undisturbed one, and no engine is left."""
    tables = granules(*[24] * 6)
    per_granule = 2 * 24
    stores = [store_in(tmp_path / name) for name in ("quiet", "killed")]
    starts = [Start(s.root.local_path(), vllm=True) for s in stores]
    for start_dir in ("quiet", "killed"):
        (tmp_path / start_dir).mkdir()
    quiet = run(pool_of(stores[0], starts[0], []), tables)
    assert sum(s.sequences for s in quiet) == starts[0].scored == 6 * per_granule
    assert {s.engine for s in quiet} <= {"engine 1", "engine 2"}

    events: list[str] = []
    pool = pool_of(stores[1], starts[1], events)
    killed: list[int] = []
    results = []
    for scored in pool.run(ray.put(table) for table in tables):
        results.append(scored)
        if not killed:
            killed.append(pool.processes[scored.engine])
            os.kill(killed[0], signal.SIGKILL)
    assert sum(s.sequences for s in results) == 6 * per_granule
    assert sorted(s.granule for s in results) == list(range(6))
    assert starts[1].scored - 6 * per_granule <= per_granule
    for ours, theirs in zip(content(stores[1], tables), content(stores[0], tables), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert any(f"(process {killed[0]} on node" in e and "was lost" in e for e in events)
    assert not [
        pid for pid in [int(p.name.split("-")[1]) for p in (tmp_path / "killed").glob("started-*")] if alive(pid)
    ]


def alive(pid: int) -> bool:
    deadline = time.monotonic() + 20  # a process that was told to end needs a moment
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("first", "said"),
    [
        pytest.param(DEADLY, "process has died", marks=pytest.mark.slow),
        pytest.param(BREAKING, "illegal memory access", marks=pytest.mark.long),
    ],
)
def test_a_group_that_kills_engines_is_left_out_and_all_others_are_scored(
    first: int, said: str, tmp_path: Path
) -> None:
    """By halving (here: eighths): 40 groups, 5, 1; two engines each."""
    tables, store, start, events = granules(40, 40, 40, g13=first), store_in(tmp_path), Start(tmp_path), []
    results = run(pool_of(store, start, events), tables)
    unscored = [u for s in results for u in s.unscored]
    assert [(u.reason, said in u.detail) for u in unscored] == [("kills_engine", True)]
    assert groups_of(unscored) == [40 + 13]
    assert sum(s.groups for s in results) == 120
    bad = tables[1].slice(13, 1)
    good = [tables[0], tables[1].slice(0, 13), tables[1].slice(14), tables[2]]
    assert content(store, good) == [formula(p, c).tolist() for p, c in sequences(good)]
    assert not store.index().find(store.keys(bad)).any()
    assert 6 <= start.starts <= 6 + 2 + 2  # two for each size; engines that were let go may have to come back
    assert sum("was lost: " in e for e in events) == 6
    assert sum("is tried again in" in e for e in events) == 2


@pytest.mark.slow
def test_a_group_without_log_probs_is_left_out(tmp_path: Path) -> None:
    tables, store, events = granules(10, 10, g3=UNSCORABLE, g7=UNSCORABLE), store_in(tmp_path), []
    results = run(pool_of(store, Start(tmp_path), events), tables)
    assert groups_of([u for s in results for u in s.unscored]) == [13, 17]
    assert sum(s.sequences for s in results) == len(store.index()) == 2 * 18
    assert events == []


@pytest.mark.slow
def test_deaths_with_progress_in_between_never_end_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_ray.reference.pool.MAX_FRUITLESS_DEATHS", 0)  # and two for the one engine of this pool
    rng = np.random.default_rng(0)
    tables = [
        table
        for first in (0, 100, 200)
        for table in (granule(first, 1, rng, g0=DEADLY), granule(first + 1, 4, rng))  # one that kills, and progress
    ]
    start, events = Start(tmp_path), []
    results = run(pool_of(store_in(tmp_path), start, events, replicas=1), tables)
    assert len([u for s in results for u in s.unscored]) == 3
    assert sum(s.sequences for s in results) == 3 * 4 * 2
    assert sum("was lost: " in e for e in events) > 2  # more than may be lost in a row


def test_without_granules_no_engine_starts(tmp_path: Path) -> None:
    start = Start(tmp_path)
    assert run(pool_of(store_in(tmp_path), start, []), []) == []
    assert start.starts == 0


def test_granules_are_handed_out_in_their_order(tmp_path: Path) -> None:
    tables = granules(*[3] * 8)
    pool = pool_of(store_in(tmp_path), Start(tmp_path, seconds=0.05), [], replicas=1)
    order = [s.granule for s in run(pool, tables)]
    assert sorted(order) == list(range(8))
    assert all(
        granule <= i + 1 for i, granule in enumerate(order)
    )  # of the two that an engine has, either may end first
    assert [s.granule for s in run(pool, granules(2))] == [0]  # another run counts, and starts engines, anew


def test_granules_are_taken_as_there_is_room(tmp_path: Path) -> None:
    """Back-pressure: no more than a few are ahead of what is done."""
    done, ahead = 0, []

    def source():
        for i, table in enumerate(granules(*[1] * 30)):
            ahead.append(i - done)
            yield ray.put(table)

    for _ in pool_of(store_in(tmp_path), Start(tmp_path, seconds=0.01), [], replicas=2).run(source()):
        done += 1
    assert done == 30
    assert max(ahead) <= 3 * 2 + 1  # two with each engine, and one more waiting than there are engines


def test_the_pool_grows_where_there_is_work_and_no_further(tmp_path: Path) -> None:
    tables, start = granules(*[2] * 12), Start(tmp_path, seconds=0.2)
    pool = pool_of(store_in(tmp_path), start, [], replicas=1, max_replicas=3)
    sizes = [pool.size for _ in pool.run(ray.put(table) for table in tables)]
    assert max(sizes) == 3
    assert sizes[-1] <= 1  # those without work were let go before the end
    (tmp_path / "few").mkdir()
    few = Start(tmp_path / "few", seconds=0.2)
    run(pool_of(store_in(tmp_path / "few"), few, [], replicas=3), granules(2, 2))
    assert few.starts <= 2


@pytest.mark.slow
def test_engines_that_die_while_they_start_stop_the_run(tmp_path: Path) -> None:
    start, events = Start(tmp_path, fault="exit"), []
    with pytest.raises(
        InfrastructureError, match=f"{MAX_FAILED_STARTS} engines in a row died while they started"
    ) as stopped:
        run(pool_of(store_in(tmp_path), start, events, replicas=1), granules(2))
    assert "memory" in stopped.value.fix
    assert start.starts == MAX_FAILED_STARTS


@pytest.mark.slow
def test_what_an_engine_says_of_its_start_is_raised_as_it_is(tmp_path: Path) -> None:
    start = Start(tmp_path, fault="error")
    with pytest.raises(EngineError, match="the engine does not start") as stopped:
        run(pool_of(store_in(tmp_path), start, [], replicas=1), granules(2))
    assert stopped.value.fix == "look at the log"
    assert start.starts == 1


def test_where_every_group_kills_the_run_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_ray.reference.pool.MAX_FRUITLESS_DEATHS", 1)  # else it takes a dozen engines
    everything = {f"g{i}": BREAKING for i in range(64)}
    with pytest.raises(InfrastructureError, match="nothing was scored in between"):
        run(pool_of(store_in(tmp_path), Start(tmp_path), [], replicas=1), granules(1, 64, **everything))
