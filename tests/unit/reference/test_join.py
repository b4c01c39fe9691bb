"""The join: by key, one log-prob for each token, null for what could not be scored, and an error for anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import ArtifactStore
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.data.schemas import QUARANTINE, TOKENS
from dpo_ray.errors import ArtifactError
from dpo_ray.reference.granule import Unscored
from dpo_ray.reference.join import REFERENCE, JoinedPart, join_part
from dpo_ray.reference.store.store import Numerics, ReferenceStore

PART = "train/00000-00000-00000.parquet"
GROUPS = [  # (prompt, completions); the first and the third share a sequence
    ([1, 2], [[3, 4, 5], [6]]),
    ([1], [[2, 3]]),
    ([1, 2], [[6], [7, 8]]),
]


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(
        Storage(tmp_path / "store"), "a" * 64, Numerics("vllm", "0.32.0", "cpu", "float32", "float32")
    )


def group_id(number: int) -> bytes:
    return bytes([number]) * 16


@pytest.fixture
def tokens(tmp_path: Path) -> Artifact:
    rows = [
        {
            "group_id": group_id(i),
            "source": f"shard {i}",
            "prompt_ids": prompt,
            "completion_ids": completions,
            "scores": [float(-k) for k in range(len(completions))],
            "chosen": [],
            "rejected": [],
            "preference_probability": 1.0,
            "weight": 1.0,
        }
        for i, (prompt, completions) in enumerate(GROUPS)
    ]
    staging = ArtifactStore(Storage(tmp_path)).begin("prepare", "k", "run")
    entry = staging.write(PART, parquet_bytes(pa.Table.from_pylist(rows, schema=TOKENS)), rows=len(rows))
    return Provenance(1, {}, {}, {}).commit(staging, [entry], rows={"train/admitted": len(rows)}, figures={})


def logps_of(prompt: list[int], completion: list[int]) -> np.ndarray:
    """Make log-probs that are a function of the sequence, exact in float32."""
    return -np.array([sum(prompt) + token for token in completion], np.float32) / 64


def fill(store: ReferenceStore, *without: int) -> None:
    """Store the sequences of all groups but some, last group first, so that no position is as it is in the tokens."""
    found = {
        store.key(prompt, c): logps_of(prompt, c)
        for i, (prompt, completions) in reversed(list(enumerate(GROUPS)))
        for c in completions
        if i not in without
    }
    store.append(list(found), list(found.values()))


def joined(tokens: Artifact, store: ReferenceStore, root: Path, *unscored: int) -> tuple[JoinedPart, pa.Table]:
    staging = ArtifactStore(Storage(root)).begin("reference", "k", "run")
    left_out = {group_id(i): Unscored(group_id(i), "no_log_probs", "they are NaN") for i in unscored}
    part = join_part(PART, tokens, store, store.index(), left_out, staging)
    return part, read_table(Provenance(1, {}, {}, {}).commit(staging, [part.entry], rows={}, figures={}), PART)


def test_every_token_has_the_log_prob_of_its_own_sequence(
    tokens: Artifact, store: ReferenceStore, tmp_path: Path
) -> None:
    fill(store)
    part, table = joined(tokens, store, tmp_path)
    assert table.schema == REFERENCE
    assert table["group_id"].to_pylist() == [group_id(i) for i in range(3)]
    assert table["token_logps"].to_pylist() == [[logps_of(p, c).tolist() for c in cs] for p, cs in GROUPS]
    assert (part.entry.name, part.entry.rows, len(part.quarantine)) == (PART, 3, 0)


@pytest.mark.parametrize("unscored", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_an_unscored_group_is_null_and_quarantined_with_its_reason(
    unscored: tuple[int, ...], tokens: Artifact, store: ReferenceStore, tmp_path: Path
) -> None:
    fill(store, *unscored)
    if unscored in [(0,), (2,)]:  # the sequence that the two share is there all the same
        fill(store)
    part, table = joined(tokens, store, tmp_path, *unscored)
    expected = [None if i in unscored else [logps_of(p, c).tolist() for c in cs] for i, (p, cs) in enumerate(GROUPS)]
    assert table["token_logps"].to_pylist() == expected
    assert part.quarantine.schema == QUARANTINE
    assert part.quarantine.to_pylist() == [
        {
            "reason": "no_log_probs",
            "detail": f"group {group_id(i).hex()}: they are NaN",
            "split": "train",
            "source": f"shard {i}",
            "ordinal": None,
            "sample": "",
        }
        for i in unscored
    ]


def test_a_completion_without_log_probs_is_an_error(tokens: Artifact, store: ReferenceStore, tmp_path: Path) -> None:
    fill(store, 1)
    with pytest.raises(ArtifactError, match="no log-probs for the key"):
        joined(tokens, store, tmp_path)


def test_as_many_log_probs_as_tokens_or_an_error(tokens: Artifact, store: ReferenceStore, tmp_path: Path) -> None:
    store.append([store.key([1], [2, 3])], [np.full(3, -1.0, np.float32)])  # before the right ones: it counts
    fill(store)
    with pytest.raises(ArtifactError, match="3 log-probs for a completion of 2 tokens"):
        joined(tokens, store, tmp_path)
