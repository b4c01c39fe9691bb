"""One engine without Ray: what it asks its scorer, what it commits, and what it says of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.reference.engine import Engine
from dpo_ray.reference.granule import GRANULE
from dpo_ray.reference.scorer import ScoreRequest, ScorerSettings
from dpo_ray.reference.store.store import Numerics, ReferenceStore

SETTINGS = ScorerSettings("vllm", "no model", "float32", "cpu", 128, None, 0.5, share_prompt=True)
NAN_TOKEN = 99


class ArithmeticScorer:
    """Log-probs by a formula, and what it was asked; a completion with NAN_TOKEN has none."""

    def __init__(self, settings: ScorerSettings) -> None:
        self.settings = settings
        self.cached_tokens = self.rescored = 0
        self.asked: list[tuple[list[int], list[int]]] = []
        self.threads = {threading.get_ident()}

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | None]:
        self.threads.add(threading.get_ident())
        self.asked += [(r.prompt_ids.tolist(), r.completion_ids.tolist()) for r in requests]
        self.cached_tokens += 5
        self.rescored += 1
        return [None if NAN_TOKEN in r.completion_ids else formula(r.prompt_ids, r.completion_ids) for r in requests]

    def close(self) -> None:
        self.threads.add(threading.get_ident())


def formula(prompt_ids: Sequence[int] | np.ndarray, completion_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return -(np.asarray(completion_ids, np.float32) + float(sum(prompt_ids))) / 64


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(Storage(tmp_path), "a" * 64, Numerics("vllm", "0.32.0", "cpu", "float32", "float32"))


@pytest.fixture
def scorer() -> ArithmeticScorer:
    return ArithmeticScorer(SETTINGS)


@pytest.fixture
def engine(store: ReferenceStore, scorer: ArithmeticScorer) -> Iterator[Engine]:
    engine = Engine("engine 1", SETTINGS, store, lambda settings: scorer)
    engine.start()
    yield engine
    engine.close()


def granule(*groups: tuple[list[int], list[list[int]]]) -> pa.Table:
    rows = [
        {"group_id": bytes([i]) * 16, "prompt_ids": prompt, "completion_ids": completions}
        for i, (prompt, completions) in enumerate(groups)
    ]
    return pa.Table.from_pylist(rows, schema=GRANULE)


def stored(store: ReferenceStore, prompt: list[int], completion: list[int]) -> list[float]:
    return store.fetch(store.index(), [store.key(prompt, completion)]).to_pylist()[0]


def test_a_granule_becomes_one_segment(engine: Engine, store: ReferenceStore, scorer: ArithmeticScorer) -> None:
    scored = engine.score(granule(([1, 2], [[3], [4, 5]]), ([6], [[7, 8, 9]])), 0, None, None)
    assert (scored.groups, scored.sequences, scored.tokens) == (2, 3, 3 + 4 + 4)
    assert (scored.cached_tokens, scored.rescored, scored.engine, scored.unscored) == (5, 1, "engine 1", ())
    assert len(store.segments()) == 1
    for prompt, completion in (([1, 2], [3]), ([1, 2], [4, 5]), ([6], [7, 8, 9])):
        assert stored(store, prompt, completion) == formula(prompt, completion).tolist()
    again = engine.score(granule(([1], [[1]])), 0, None, None)
    assert (again.cached_tokens, again.rescored) == (5, 1)  # of this granule, not since the start


def test_a_sequence_that_is_asked_for_twice_is_scored_once(
    engine: Engine, store: ReferenceStore, scorer: ArithmeticScorer
) -> None:
    scored = engine.score(granule(([1], [[2], [3], [2]]), ([1], [[3], [4]]), ([2], [[3]])), 0, None, None)
    assert scorer.asked == [([1], [2]), ([1], [3]), ([1], [4]), ([2], [3])]
    assert (scored.groups, scored.sequences) == (3, 4)
    assert len(store.index()) == 4


def test_groups_without_log_probs_are_named_and_the_rest_is_kept(engine: Engine, store: ReferenceStore) -> None:
    groups = granule(([1], [[2], [NAN_TOKEN]]), ([3], [[4]]), ([1], [[NAN_TOKEN]]), ([5], [[6]]))
    scored = engine.score(groups, 0, None, None)
    assert [(u.group_id, u.reason) for u in scored.unscored] == [
        (bytes([0]) * 16, "no_log_probs"),
        (bytes([2]) * 16, "no_log_probs"),  # it asks for the same sequence
    ]
    assert scored.sequences == len(store.index()) == 3
    only = engine.score(granule(([1], [[NAN_TOKEN]])), 0, None, None)
    assert (only.sequences, len(only.unscored), len(store.segments())) == (0, 1, 1)


def test_a_piece_of_a_granule(engine: Engine, store: ReferenceStore, scorer: ArithmeticScorer) -> None:
    groups = granule(*(([i], [[i, i]]) for i in range(5)))
    scored = engine.score(groups, 1, 3, None)
    assert scorer.asked == [([1], [1, 1]), ([2], [2, 2])]
    assert scored.groups == 2


def test_what_a_lost_engine_had_committed_is_not_scored_again(
    engine: Engine, store: ReferenceStore, scorer: ArithmeticScorer
) -> None:
    groups = granule(([1], [[2], [3]]), ([4], [[5]]), ([6], [[7]]))
    known = store.segments()
    store.append([store.key([1], [3]), store.key([4], [5])], [formula([1], [3]), formula([4], [5])])
    scored = engine.score(groups, 0, None, known)
    assert scorer.asked == [([1], [2]), ([6], [7])]
    assert (scored.groups, scored.sequences) == (3, 4)  # all four are of this run
    asked = len(scorer.asked)
    assert engine.score(groups, 0, None, known).sequences == 4
    assert (len(scorer.asked), len(store.segments())) == (asked, 2)


def test_the_scorer_lives_in_one_thread(engine: Engine, scorer: ArithmeticScorer) -> None:
    scorer.threads.clear()
    callers = [threading.Thread(target=engine.score, args=(granule(([i], [[i]])), 0, None, None)) for i in range(1, 4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    engine.close()
    assert len(scorer.threads) == 1
    assert threading.get_ident() not in scorer.threads
