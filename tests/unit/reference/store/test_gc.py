"""What `store gc` deletes, merges and leaves alone, and that nothing sound is lost on the way."""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.artifacts.lease import Lease
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError, LeaseError
from dpo_ray.reference.store import gc
from dpo_ray.reference.store.care import verify
from dpo_ray.reference.store.gc import clear
from dpo_ray.reference.store.segment import read_keys, stamp_nanoseconds
from dpo_ray.reference.store.store import Numerics, ReferenceStore

DAY = 86400.0


def store_at(root: Path | str, model: str = "a") -> ReferenceStore:
    return ReferenceStore(Storage(root), model * 64, Numerics("vllm", "0.32.0", "cpu", "float32", "float32"))


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return store_at(tmp_path)


def key(store: ReferenceStore, number: int) -> bytes:
    return store.key([1], [number])


def append(store: ReferenceStore, numbers: range | list[int], value: float = -1.0) -> str:
    return store.append([key(store, n) for n in numbers], [np.full(2, value - n, np.float32) for n in numbers])


def age(store: ReferenceStore, seconds: float) -> None:
    """Make the partition look as if it was last used so long ago."""
    place = store.partition.local_path()
    (place / "used.json").write_text(f'{{"unix_seconds": {time.time() - seconds}}}')
    for name in store.segments():
        stamp = (stamp_nanoseconds(name) or 0) - int(seconds * 1e9)
        (place / name).rename(place / re.sub("segment-[0-9a-f]{16}", f"segment-{stamp:016x}", name))


def held(store: ReferenceStore, numbers: range | list[int]) -> list[list[float] | None]:
    index = store.index()
    known = [n for n in numbers if index.find([key(store, n)])[0]]
    found = dict(zip(known, store.fetch(index, [key(store, n) for n in known]).to_pylist(), strict=True))
    return [found.get(n) for n in numbers]


def files(store: ReferenceStore) -> list[str]:
    return sorted(p.name for p in store.partition.local_path().iterdir())


def done(store: ReferenceStore, **options) -> list[tuple[str, int, str]]:
    return [(c.action, c.files, c.why) for c in clear(store.root, **options)]


def test_small_segments_become_one(store: ReferenceStore) -> None:
    names = [append(store, range(5 * n, 5 * n + 5)) for n in range(4)]
    size = sum(store.partition.size(name) for name in names)
    age(store, 3 * 3600)
    index = store.index()
    (cleared,) = clear(store.root, force=True)  # the index was a use
    assert (cleared.action, cleared.files, cleared.bytes) == ("merged", 4, size)
    (merged,) = store.segments()
    assert read_keys(store.partition, merged).tolist() == [key(store, n) for n in range(20)]
    assert held(store, range(20)) == [[-1.0 - n] * 2 for n in range(20)]
    # Who holds the old index is served all the same.
    assert store.fetch(index, [key(store, 7)]).to_pylist() == [[-8.0, -8.0]]
    assert done(store, force=True) == []


def test_what_was_used_in_the_last_hour_is_left_alone(store: ReferenceStore) -> None:
    append(store, [1])
    append(store, [2])
    age(store, 1.9 * 3600)  # the mark may be an hour older than the use
    before = files(store)
    assert [action for action, _, _ in done(store, unused_days=0)] == ["left alone"]
    assert files(store) == before
    age(store, 2.1 * 3600)
    assert [action for action, _, _ in done(store)] == ["merged"]


def test_a_dry_run_changes_nothing_and_says_the_same(store: ReferenceStore) -> None:
    append(store, range(5))
    append(store, range(5))
    torn = store.partition.local_path(append(store, range(5, 9)))
    torn.write_bytes(torn.read_bytes()[:-1])
    append(store, range(9, 12))
    age(store, DAY)
    before = {p: p.stat().st_mtime_ns for p in sorted(store.root.local_path().rglob("*"))}
    said = clear(store.root, dry_run=True)
    assert {p: p.stat().st_mtime_ns for p in sorted(store.root.local_path().rglob("*"))} == before
    assert [c.action for c in said] == ["deleted", "deleted", "merged"]
    assert clear(store.root) == said
    assert len(store.segments()) == 1


def test_damage_is_deleted_and_the_rest_is_kept(store: ReferenceStore) -> None:
    append(store, range(5))
    torn = store.partition.local_path(append(store, range(5, 9)))
    torn.write_bytes(torn.read_bytes()[:100])
    (store.partition.local_path() / "about.json").write_text("{")
    (store.partition.local_path() / "README.txt").write_text("mine")
    age(store, DAY)
    assert [(f.where.rpartition("/")[2][:8]) for f in verify(store.root)] == ["about.js", "segment-"]
    assert done(store) == [("deleted", 1, "damaged"), ("deleted", 1, "damaged")]
    assert list(verify(store.root)) == []
    assert held(store, range(9)) == [[-1.0 - n] * 2 for n in range(5)] + [None] * 4
    assert (store.partition.local_path() / "README.txt").read_text() == "mine"
    append(store, range(5, 9))
    assert (store.partition.local_path() / "about.json").read_text().count("vllm") == 1


def test_what_dead_writers_left_is_deleted_and_what_is_being_written_is_not(store: ReferenceStore) -> None:
    append(store, range(5))
    age(store, DAY)
    old, new = (store.partition.local_path() / f".tmp-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 3600,) * 2)
    assert done(store) == [("deleted", 1, "left by writers that died")]
    assert (old.exists(), new.exists()) == (False, True)


def test_contradictions_are_left_out_and_the_rest_is_kept(store: ReferenceStore) -> None:
    append(store, range(6))
    append(store, [3, 4], value=-2.0)
    append(store, range(6, 9))
    age(store, DAY)
    assert len(list(verify(store.root))) == 1
    ((action, count, why),) = done(store)
    assert (action, count) == ("merged", 3)
    assert "2 sequences" in why
    assert list(verify(store.root)) == []
    assert held(store, range(9)) == [None if n in (3, 4) else [-1.0 - n] * 2 for n in range(9)]


def test_contradictions_in_large_segments_are_left_out_too(store: ReferenceStore, monkeypatch) -> None:
    append(store, range(6))
    append(store, [3, 4, 6], value=-2.0)
    append(store, [7])
    age(store, DAY)
    monkeypatch.setattr(gc, "SMALL_BYTES", 0)
    monkeypatch.setattr(gc, "MERGED_BYTES", 1)
    assert [(action, count) for action, count, _ in done(store)] == [("merged", 1), ("merged", 1)]
    assert held(store, [2, 3, 4, 6, 7]) == [[-3.0] * 2, None, None, [-8.0] * 2, [-8.0] * 2]
    assert list(verify(store.root)) == []


def test_segments_are_merged_up_to_a_size(store: ReferenceStore, monkeypatch) -> None:
    names = [append(store, range(100 * n, 100 * n + 100)) for n in range(5)]
    size = store.partition.size(names[0])
    monkeypatch.setattr(gc, "MERGED_BYTES", int(2.5 * size))
    monkeypatch.setattr(gc, "SMALL_BYTES", int(1.5 * size))
    age(store, DAY)
    assert [(action, count) for action, count, _ in done(store)] == [("merged", 2), ("merged", 2)]
    assert len(store.segments()) == 3
    assert held(store, range(500)) == [[-1.0 - n] * 2 for n in range(500)]


def test_a_merged_entry_still_comes_before_that_of_a_newer_segment(store: ReferenceStore, monkeypatch) -> None:
    """The first segment is merged with the third, and the large one between them has the same sequence."""
    append(store, [1])
    large = append(store, range(1, 200), value=-1.0 - 1e-5)  # as another batch of the same model rounds
    append(store, [200])
    monkeypatch.setattr(gc, "SMALL_BYTES", store.partition.size(large))
    age(store, DAY)
    assert [(action, count) for action, count, _ in done(store)] == [("merged", 2)]
    assert len(store.segments()) == 2
    assert held(store, [1]) == [[-2.0, -2.0]]


def test_unused_partitions_are_deleted_only_when_asked(tmp_path: Path) -> None:
    old, new = store_at(tmp_path, "a"), store_at(tmp_path, "b")
    for store, days in ((old, 40), (new, 20)):
        append(store, [1])
        age(store, days * DAY)
    assert clear(old.root) == []
    assert done(old, unused_days=50) == []
    assert done(old, unused_days=30) == [("deleted", 1, "all: not used for 40 days")]
    assert not old.partition.local_path().exists()
    assert held(new, [1]) == [[-2.0, -2.0]]


def test_an_unused_partition_goes_without_what_is_not_the_stores(store: ReferenceStore) -> None:
    append(store, [1])
    (store.partition.local_path() / "README.txt").write_text("mine")
    age(store, 40 * DAY)
    assert len(done(store, unused_days=30)) == 1
    assert files(store) == ["README.txt"]


def test_a_partition_without_a_sound_segment_goes(store: ReferenceStore) -> None:
    store.partition.local_path(append(store, [1])).write_bytes(b"")
    age(store, DAY)
    assert done(store) == [("deleted", 1, "all: it contains no valid segment")]
    assert not store.partition.local_path().exists()


@pytest.mark.parametrize("options", [{"force": True}, {"unused_days": 30}])
def test_what_a_run_adds_to_a_partition_that_is_being_deleted_stays(
    options: dict, store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins just after the partition was looked at: one segment is complete, and another is being written."""
    append(store, [1])
    store.partition.local_path(append(store, [1])).write_bytes(b"")
    if "force" in options:
        store.partition.local_path(store.segments()[0]).write_bytes(b"")
    age(store, 40 * DAY)
    real = gc._drop

    def added_before(*arguments: Any) -> Any:
        append(store, [2])
        (store.partition.local_path() / ".tmp-0123456789abcdef").write_bytes(b"x")
        return real(*arguments)

    monkeypatch.setattr(gc, "_drop", added_before)
    assert len(done(store, **options)) == 1
    assert held(store, [1, 2]) == [None, [-3.0, -3.0]]
    assert {".tmp-0123456789abcdef", "about.json"} < set(files(store))


def test_a_partition_to_which_a_run_is_writing_its_first_segment_stays(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, [1])
    age(store, 40 * DAY)
    real = gc._drop

    def begun_before(*arguments: Any) -> Any:
        (store.partition.local_path() / ".tmp-0123456789abcdef").write_bytes(b"x")
        return real(*arguments)

    monkeypatch.setattr(gc, "_drop", begun_before)
    assert len(done(store, unused_days=30)) == 1
    assert files(store) == [".tmp-0123456789abcdef", "about.json", "used.json"]


def test_a_run_reads_and_writes_while_the_store_is_cleared(store: ReferenceStore) -> None:
    ended, failures = threading.Event(), []

    def clear_again_and_again() -> None:
        while not ended.is_set():
            try:
                clear(store.root, force=True)
            except Exception as error:  # an error in a thread would be lost
                failures.append(error)

    cleaner = threading.Thread(target=clear_again_and_again)
    cleaner.start()
    for n in range(20):
        append(store, range(3 * n, 3 * n + 5))
        assert held(store, range(3 * n + 5)) == [[-1.0 - k] * 2 for k in range(3 * n + 5)]
    ended.set()
    cleaner.join()
    assert failures == []
    assert held(store, range(62)) == [[-1.0 - n] * 2 for n in range(62)]


def test_directories_that_are_no_partitions_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "segment-0123456789abcdef-0123456789abcdef.parquet").write_bytes(b"")
    assert clear(Storage(tmp_path), unused_days=0, force=True) == []
    assert [p.name for p in tmp_path.rglob("*") if p.is_dir()] == ["artifacts"]


def test_one_clears_at_a_time(store: ReferenceStore) -> None:
    append(store, [1])
    with Lease(store.root.child("gc")), pytest.raises(LeaseError):
        clear(store.root, force=True)
    assert clear(store.root, force=True) == []


@pytest.mark.parametrize("writes", [0, 1])
@pytest.mark.parametrize("deletes", [0, 1, 2])
def test_a_death_in_the_middle_loses_nothing(writes: int, deletes: int, store: ReferenceStore, monkeypatch) -> None:
    """Stop merging after so many writes or deletes: everything is still there, and the next time ends the work."""
    for n in range(4):
        append(store, range(3 * n, 3 * n + 5))
    age(store, DAY)
    left = {"write": writes, "delete": deletes}

    def dying(method: str):
        real = getattr(Storage, method)

        def call(self: Storage, name: str, *args, **options):
            if name.startswith("segment-"):
                if not left[method]:
                    raise ArtifactError("killed")
                left[method] -= 1
            return real(self, name, *args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", dying("write"))
        patch.setattr(Storage, "delete", dying("delete"))
        with pytest.raises(ArtifactError, match="killed"):
            clear(store.root)
    assert held(store, range(14)) == [[-1.0 - n] * 2 for n in range(14)]
    clear(store.root, force=True)
    assert held(store, range(14)) == [[-1.0 - n] * 2 for n in range(14)]
    assert len(store.segments()) == 1


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), max_size=2),
    st.sampled_from([0, 1600, 1 << 20]),
)
def test_clearing_changes_nothing_that_is_sound(columns: list[list[int]], torn: list[int], small: int) -> None:
    """Whatever overlaps, whatever is torn, and whatever counts as small."""
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "SMALL_BYTES", small)
        patch.setattr(gc, "MERGED_BYTES", 2 * small)
        store = store_at(root)
        for n, numbers in enumerate(columns):
            path = store.partition.local_path(append(store, numbers, value=-1.0 - n * 1e-5))
            if n in torn:
                path.write_bytes(path.read_bytes()[:-1])
        before = held(store, range(10))
        clear(store.root, force=True)
        assert held(store, range(10)) == before
        assert list(verify(store.root)) == []
