"""The exact scorer: what it returns is what a plain forward pass gives; granules reach the store once, whole, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings, strategies
from transformers import AutoModelForCausalLM

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.groups import Group
from dpo_ray.models.builtin import builtin_model
from dpo_ray.reference.granule import GRANULE, Scored
from dpo_ray.reference.scorer import ScoreRequest, ScorerSettings
from dpo_ray.reference.store.store import Numerics, ReferenceStore
from dpo_ray.reference.trainer_scorer import TrainerScorer, score_granules

MODEL = builtin_model("sentiment_llama")
LOUD = 9  # a token whose embedding is not finite in `broken_model`


def scorer_settings(max_batched_tokens: int | None = None, model: Path = MODEL) -> ScorerSettings:
    return ScorerSettings("trainer", str(model), "float32", "cpu", 256, max_batched_tokens, 0.9, True)


def requests() -> list[ScoreRequest]:
    """Interleave groups, and let one group number come with two prompts."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 700, n, dtype=np.int32) for n in (7, 1, 12)]
    plan = [(0, 0, 4), (1, 1, 1), (0, 0, 9), (2, 2, 3), (1, 1, 6), (0, 2, 5), (2, 2, 1), (0, 0, 4)]
    return [ScoreRequest(g, prompts[p], rng.integers(10, 700, n, dtype=np.int32)) for g, p, n in plan]


@torch.no_grad()
def plain(asked: Sequence[ScoreRequest]) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    results = []
    for r in asked:
        ids = torch.tensor(np.concatenate([r.prompt_ids, r.completion_ids]), dtype=torch.int64)[None]
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        results.append(logps[len(r.prompt_ids) - 1 :].numpy())
    return results


def make_granule(seed: int, sizes: Sequence[tuple[int, Sequence[int]]]) -> pa.Table:
    """Make groups of random ids: the prompt's length, and each completion's."""
    rng = np.random.default_rng(seed)
    columns = {
        "group_id": [rng.bytes(16) for _ in sizes],
        "prompt_ids": [rng.integers(10, 700, n).tolist() for n, _ in sizes],
        "completion_ids": [[rng.integers(10, 700, n).tolist() for n in lengths] for _, lengths in sizes],
    }
    return pa.table(columns, schema=GRANULE)


def asked_of(granule: pa.Table) -> list[ScoreRequest]:
    return [
        ScoreRequest(g, np.array(row["prompt_ids"], np.int32), np.array(ids, np.int32))
        for g, row in enumerate(granule.to_pylist())
        for ids in row["completion_ids"]
    ]


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    numerics = Numerics("trainer", "test", "cpu", "float32", "float32")
    return ReferenceStore(Storage(tmp_path / "store"), "model", numerics)


@pytest.fixture(scope="module")
def scorer() -> TrainerScorer:
    return TrainerScorer(scorer_settings(), TrainConfig(tokens_per_micro_batch=64))


def run(
    scorer: TrainerScorer, store: ReferenceStore, granules: Sequence[pa.Table], stop_after: int = 99
) -> list[Scored]:
    """Score granules as one process, until the one that hears of them has enough."""
    heard: list[Scored] = []

    def report(scored: Scored) -> bool:
        assert scored.granule == len(heard)
        assert len(store.index()) >= sum(s.sequences for s in [*heard, scored])  # what is reported is in the store
        heard.append(scored)
        return len(heard) < stop_after

    score_granules(scorer, store, (), granules, report)
    return heard


def check_stored(store: ReferenceStore, granule: pa.Table) -> None:
    stored = store.fetch(store.index(), store.keys(granule))
    for actual, expected in zip(stored.to_pylist(), plain(asked_of(granule)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_batched_tokens", [8, 40, None])
def test_scores_are_those_of_a_plain_forward(max_batched_tokens: int | None) -> None:
    scorer, asked = TrainerScorer(scorer_settings(max_batched_tokens)), requests()
    scores = scorer.score(asked)
    for actual, expected in zip(scores, plain(asked), strict=True):
        assert actual is not None
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    assert scorer.cached_tokens == 7 * 2 + 1 + 12 + 0  # each prompt once for all its completions
    assert scorer.score([]) == []
    scorer.close()


@settings(max_examples=15, deadline=None)
@given(
    sizes=strategies.lists(
        strategies.tuples(
            strategies.integers(1, 9), strategies.lists(strategies.integers(1, 9), min_size=1, max_size=4)
        ),
        max_size=7,
    ),
    ranks=strategies.integers(1, 4),
)
def test_the_ranks_shares_are_the_whole_in_equally_many_forward_passes(
    scorer: TrainerScorer, sizes: list[tuple[int, list[int]]], ranks: int
) -> None:
    """Ranks that did not all make the same number of passes would wait for each other for ever."""
    asked = asked_of(make_granule(1, sizes))
    groups = [
        Group(
            bytes(16),
            next(r.prompt_ids for r in asked if r.group == g),
            tuple(r.completion_ids for r in asked if r.group == g),
            np.zeros(len(lengths), np.float32),
        )
        for g, (_, lengths) in enumerate(sizes)
    ]
    whole = scorer.score_share(groups)
    assert sorted(whole) == list(range(len(groups)))
    passes: list[int] = []
    counting = scorer._policy.register_forward_hook(lambda *_: passes.append(rank))
    shares: dict[int, list[np.ndarray]] = {}
    try:
        for rank in range(ranks):
            scorer.rank, scorer.ranks = rank, ranks
            share = scorer.score_share(groups)
            assert not shares.keys() & share.keys()
            shares |= share
    finally:
        scorer.rank, scorer.ranks = 0, 1
        counting.remove()
    assert len({passes.count(rank) for rank in range(ranks)}) == 1
    assert shares.keys() == whole.keys()
    for g, token_logps in whole.items():
        assert [len(x) for x in token_logps] == sizes[g][1]
        for a, b in zip(token_logps, shares[g], strict=True):
            np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-6)  # of -14 nats, float32 knows no more than 1e-6


def test_granules_are_stored_each_as_a_segment_and_counted(scorer: TrainerScorer, store: ReferenceStore) -> None:
    granules = [make_granule(1, [(5, [3, 4]), (2, [6]), (30, [9, 1, 1])]), make_granule(2, [(1, [1])])]
    first, second = run(scorer, store, granules)
    assert (first.groups, first.sequences, first.unscored) == (3, 6, ())
    assert first.tokens == (2 * 5 + 7) + (2 + 6) + (3 * 30 + 11)
    assert first.cached_tokens == 5 + 2 * 30
    assert (second.groups, second.sequences, second.tokens) == (1, 1, 2)
    assert len(store.segments()) == 2
    for granule in granules:
        check_stored(store, granule)


def test_what_workers_before_have_committed_is_counted_and_not_scored_again(
    scorer: TrainerScorer, store: ReferenceStore
) -> None:
    granules = [make_granule(n, [(5, [3, 4]), (2, [6]), (7, [2, 2])]) for n in (1, 2, 3)]
    assert len(run(scorer, store, granules, stop_after=1)) == 1
    before = store.fetch(store.index(), store.keys(granules[0]))
    half = store.keys(granules[1])[[1, 2]]  # a rank's segment of the second granule, before another rank died
    store.append(half, [np.full(4, -1.0, np.float32), np.full(6, -1.0, np.float32)])

    done, partly, missing = run(scorer, store, granules)
    assert (done.sequences, done.tokens, done.cached_tokens) == (5, 0, 0)
    assert (partly.sequences, partly.tokens) == (5, (5 + 3) + (2 * 7 + 4))
    assert (missing.sequences, missing.tokens) == (5, (2 * 5 + 7) + (2 + 6) + (2 * 7 + 4))
    assert [s.groups for s in (done, partly, missing)] == [3, 3, 3]
    assert len(store.segments()) == 1 + 1 + 2
    assert store.fetch(store.index(), store.keys(granules[0])).equals(before)
    assert store.fetch(store.index(), half).to_pylist() == [[-1.0] * 4, [-1.0] * 6]
    check_stored(store, granules[2])


def test_a_sequence_that_several_groups_have_is_scored_once(scorer: TrainerScorer, store: ReferenceStore) -> None:
    rows = make_granule(1, [(5, [3, 4]), (5, [3, 2])]).to_pylist()
    rows[1]["prompt_ids"] = rows[0]["prompt_ids"]
    rows[1]["completion_ids"][0] = rows[0]["completion_ids"][0]
    granule = pa.Table.from_pylist(rows, GRANULE)
    [scored] = run(scorer, store, [granule])
    assert (scored.sequences, scored.tokens) == (3, 3 * 5 + 3 + 4 + 2)
    check_stored(store, granule)


def test_they_stop_where_nobody_listens(scorer: TrainerScorer, store: ReferenceStore) -> None:
    granules = [make_granule(n, [(5, [3, 4])]) for n in (1, 2, 3)]
    assert len(run(scorer, store, granules, stop_after=2)) == 2
    assert len(store.index()) == 4


@pytest.fixture
def broken_model(tmp_path: Path) -> Path:
    """Make a model that gives no finite log-probs once it has read the token LOUD."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    head = model.get_output_embeddings().weight.detach().clone()
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.get_output_embeddings().weight = torch.nn.Parameter(head)
        model.get_input_embeddings().weight[LOUD] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    return tmp_path / "broken"


def test_groups_without_finite_log_probs_are_named_and_the_rest_is_stored(
    broken_model: Path, store: ReferenceStore
) -> None:
    rows = make_granule(1, [(5, [3, 4]), (6, [2, 2]), (4, [5, 5]), (4, [5, 3])]).to_pylist()
    rows[0]["prompt_ids"][1] = LOUD  # both completions follow it
    rows[2]["completion_ids"][1][2] = LOUD
    rows[3]["prompt_ids"] = rows[2]["prompt_ids"]  # the same sequence in another group: scored once, and neither has it
    rows[3]["completion_ids"][0] = rows[2]["completion_ids"][1]
    granule = pa.Table.from_pylist(rows, GRANULE)
    [scored] = run(TrainerScorer(scorer_settings(model=broken_model)), store, [granule])
    assert scored.groups == 4
    assert [(u.group_id, u.reason) for u in scored.unscored] == [
        (rows[g]["group_id"], "no_log_probs") for g in (0, 2, 3)
    ]
    assert scored.sequences == 4
    assert store.index().find(store.keys(granule)).tolist() == [False, False, True, True, True, False, False, True]
