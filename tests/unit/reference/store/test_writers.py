"""Several processes at one reference store at the same time, and a store in a bucket."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.reference.store.care import stats, verify
from dpo_ray.reference.store.gc import clear
from dpo_ray.reference.store.store import Numerics, ReferenceStore

WRITER = """
import sys
import numpy as np
from dpo_ray.artifacts.storage import Storage
from dpo_ray.reference.store.store import Numerics, ReferenceStore

root, first = sys.argv[1], int(sys.argv[2])
store = ReferenceStore(Storage(root), "a" * 64, Numerics("vllm", "0", "cpu", "float32", "float32"))
for begin in range(first, first + 400, 10):
    numbers = range(begin, begin + 20)  # the last ten come again with the next segment
    store.append([store.key([n], [n + 1]) for n in numbers], [np.full(n % 7 + 1, -n, np.float32) for n in numbers])
"""


def store_at(root: Path | str) -> ReferenceStore:
    return ReferenceStore(Storage(root), "a" * 64, Numerics("vllm", "0", "cpu", "float32", "float32"))


def held(store: ReferenceStore, numbers: range) -> list[int]:
    """Return those of the numbers that the store has, after seeing that each has its own values."""
    index = store.index()
    assert not index.damaged
    keys = [store.key([n], [n + 1]) for n in numbers]
    known = np.flatnonzero(index.find(keys)).tolist()
    found = store.fetch(index, [keys[at] for at in known])
    assert found.to_pylist() == [[-float(numbers[at])] * (numbers[at] % 7 + 1) for at in known]
    return [numbers[at] for at in known]


def test_two_write_while_others_read_and_clear(tmp_path: Path) -> None:
    store, numbers = store_at(tmp_path), range(0, 620)
    # Both write the numbers from 200 to 410.
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(first)]) for first in (0, 200)]
    seen: list[int] = []
    looks = 0
    try:
        while any(writer.poll() is None for writer in writers):
            now = held(store, numbers)
            assert set(seen) <= set(now), "what was in the store is no more"
            seen, looks = now, looks + 1
            if looks % 3 == 0:
                clear(store.root, force=True)
            time.sleep(0.01)
    finally:
        for writer in writers:
            writer.kill()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert looks > 3
    assert held(store, numbers) == list(range(610))
    clear(store.root, force=True)
    assert len(store.segments()) == 1
    assert held(store, numbers) == list(range(610))
    assert list(verify(store.root)) == []


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("store-bucket", exist_ok=True)  # what moto holds outlives its servers
    yield "store-bucket"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_in_a_bucket(bucket: str) -> None:
    store = store_at(f"s3://{bucket}/store")
    assert len(store.index()) == 0
    for begin in range(0, 60, 10):
        numbers = range(begin, begin + 15)
        store.append([store.key([n], [n + 1]) for n in numbers], [np.full(n % 7 + 1, -n, np.float32) for n in numbers])
    assert held(store, range(70)) == list(range(65))
    index = store.index()
    store.partition.write(store.segments()[-1], b"PAR1")
    assert store.index().damaged == (store.segments()[-1],)
    assert len(list(verify(store.root))) == 1
    assert [(c.action, c.files) for c in clear(store.root, force=True)] == [("deleted", 1), ("merged", 5)]
    assert held(store, range(70)) == list(range(55))
    assert store.fetch(index, [store.key([3], [4])]).to_pylist() == [[-3.0] * 4]
    assert [(p.segments, p.sequences) for p in stats(store.root)] == [(1, 55)]
    assert [c.why for c in clear(store.root, force=True, unused_days=0)] == ["all: not used for 0 days"]
    assert stats(store.root) == []
