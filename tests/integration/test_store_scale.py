"""Look-up of 100,000 groups in a store of a million keys: how long it takes, and in how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.reference.store.store import KEY, Numerics, ReferenceStore

KEYS, KEYS_OF_A_SEGMENT = 1_000_000, 50_000
PARTS, GROUPS_OF_A_PART, KNOWN_PARTS = 8, 12_500, 6
TOKENS = 170  # of a prompt, and of a completion, on average
SCORING_SECONDS = 100_000 / 20  # the smallest model in use scores 20 pairs a second on two cores

LOOK_UP = """
import json, sys, time
from pathlib import Path

import pyarrow.parquet as pq
from dpo_ray.artifacts.storage import Storage
from dpo_ray.reference.store.store import Numerics, ReferenceStore

began, used = time.monotonic(), time.process_time()
store = ReferenceStore(Storage(sys.argv[1]), "a" * 64, Numerics("vllm", "0", "cpu", "float32", "float32"))
index = store.index()
keys = [store.keys(pq.read_table(part)) for part in sorted(Path(sys.argv[2]).iterdir())]
known = [int(index.find(k).sum()) for k in keys]
seconds, cpu_seconds = time.monotonic() - began, time.process_time() - used
fetched = store.fetch(index, keys[0])
# Of this program only: what getrusage says would count the process that started it, too.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "index": len(index), "known": known, "seconds": seconds, "cpu_seconds": cpu_seconds,
    "peak_bytes": int(status["VmHWM"].split()[0]) * 1024, "values": fetched.values.to_numpy()[:20].tolist(),
    "lengths": sorted(set(fetched.value_lengths().to_pylist())),
}))
"""


def lists(rng: np.random.Generator, count: int) -> pa.ListArray:
    ends = np.concatenate([[0], np.cumsum(rng.integers(TOKENS // 2, TOKENS * 3 // 2, count))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(rng.integers(0, 32_000, ends[-1], dtype=np.int32)))


def log_probs(first: int, count: int) -> pa.ListArray:
    """Return two values for each key, from which its number can be told."""
    numbers = np.repeat(np.arange(first, first + count, dtype=np.float32), 2)
    return pa.ListArray.from_arrays(pa.array(np.arange(0, 2 * count + 1, 2, dtype=np.int32)), pa.array(-numbers))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory where Linux has it")
def test_a_look_up_among_a_million_keys(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store = ReferenceStore(Storage(tmp_path / "store"), "a" * 64, Numerics("vllm", "0", "cpu", "float32", "float32"))
    (tmp_path / "tokens").mkdir()
    keys = []
    for part in range(PARTS):
        completions = lists(rng, 2 * GROUPS_OF_A_PART)
        pairs = pa.array(np.arange(0, 2 * GROUPS_OF_A_PART + 1, 2, dtype=np.int32))
        columns = {
            "prompt_ids": lists(rng, GROUPS_OF_A_PART),
            "completion_ids": pa.ListArray.from_arrays(pairs, completions),
        }
        table = pa.table(columns)
        pq.write_table(table, tmp_path / "tokens" / f"{part}.parquet", use_dictionary=False)
        if part < KNOWN_PARTS:
            keys.append(store.keys(table))
    others = KEYS - sum(map(len, keys))
    every = np.concatenate([*keys, np.frombuffer(rng.bytes(KEY.itemsize * others), KEY)])
    shuffled = rng.permutation(KEYS)  # the groups' keys lie in all segments
    for begin in range(0, KEYS, KEYS_OF_A_SEGMENT):
        at = shuffled[begin : begin + KEYS_OF_A_SEGMENT]
        store.append(every[at], log_probs(0, KEYS).take(pa.array(at)))

    command = [sys.executable, "-c", LOOK_UP, str(tmp_path / "store"), str(tmp_path / "tokens")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    print({name: found[name] for name in ("seconds", "cpu_seconds", "peak_bytes")})
    assert found["index"] == KEYS
    assert found["known"] == [2 * GROUPS_OF_A_PART] * KNOWN_PARTS + [0] * (PARTS - KNOWN_PARTS)
    assert found["lengths"] == [2]
    assert found["values"] == [-float(n // 2) for n in range(20)]
    assert found["seconds"] < SCORING_SECONDS / 20
    assert found["cpu_seconds"] < 20
    assert found["peak_bytes"] < 2**30
