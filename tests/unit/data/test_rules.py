"""Rules over all rows, against a model of Python sets that decides row by row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_ray.config.data import RulesConfig
from dpo_ray.data.admission import REASONS
from dpo_ray.data.rules import ID_DTYPE, Candidates, Outcome, candidates, mixture, select
from dpo_ray.data.schemas import SHARD

COLUMNS = ("group_id", "prompt_hash", "opposite_id")


@dataclass(frozen=True, order=True)
class Row:
    """A group by its content; `third` makes it a list of three, which has no opposite."""

    prompt: int
    chosen: int
    rejected: int
    third: int = 0

    @property
    def group_id(self) -> bytes:  # zeros inside and at the end, and few that differ early
        return bytes([0, self.prompt, 0, self.chosen, self.rejected, self.third]).ljust(16, b"\0")

    @property
    def prompt_hash(self) -> bytes:
        return bytes([self.prompt]).rjust(16, b"\0")

    @property
    def opposite_id(self) -> bytes | None:
        return None if self.third else Row(self.prompt, self.rejected, self.chosen).group_id


Shard = tuple[int, list[Row]]  # place of the source, rows

rows = st.builds(Row, *[st.integers(0, 3)] * 3, third=st.sampled_from([0, 0, 0, 1])).filter(
    lambda row: row.chosen != row.rejected
)
shards = st.lists(st.tuples(st.integers(0, 2), st.lists(rows, max_size=12)), max_size=6)
all_rules = st.builds(
    RulesConfig, conflicts=st.sampled_from(["drop", "keep"]), leakage=st.sampled_from(["drop", "keep"])
)
held_out_prompts = st.none() | st.lists(st.integers(0, 4), max_size=3)
FALLING_HASHES = [2, 1]  # of held-out prompts
all_caps = st.lists(st.none() | st.integers(1, 6), min_size=3, max_size=3)
all_weights = st.just([None] * 3) | st.lists(st.sampled_from([0.1, 0.3, 0.5, 1, 2]), min_size=3, max_size=3)


def table(of: Sequence[Row]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in of] for name in COLUMNS}
    return pa.table(columns, schema=pa.schema([SHARD.field(name) for name in COLUMNS]))


def chosen_among(given_shards: Sequence[Shard], prompts: Sequence[int] | None, rules, caps, weights) -> list[Outcome]:
    everything = candidates((source, table(of)) for source, of in given_shards)
    hashes = None if prompts is None else np.array([Row(p, 0, 1).prompt_hash for p in prompts], ID_DTYPE)
    return [Outcome(o) for o in select(everything, hashes, rules, caps, weights)]


def model(given_shards: Sequence[Shard], prompts: Sequence[int] | None, rules, caps, weights) -> list[Outcome]:
    """The rules as one would say them, one row after the other."""
    flat = [(source, row) for source, of in given_shards for row in of]
    outcomes = [Outcome.ADMITTED] * len(flat)

    def admitted() -> list[int]:
        return [i for i, outcome in enumerate(outcomes) if outcome == Outcome.ADMITTED]

    seen: set[bytes] = set()
    for i in sorted(range(len(flat)), key=lambda i: (flat[i][0], i)):
        if flat[i][1].group_id in seen:
            outcomes[i] = Outcome.DUPLICATE
        seen.add(flat[i][1].group_id)
    if rules.conflicts == "drop":
        for i in admitted():
            if flat[i][1].opposite_id in seen:
                outcomes[i] = Outcome.CONFLICTING_PAIR
    if prompts is not None and rules.leakage == "drop":
        for i in admitted():
            if flat[i][1].prompt in prompts:
                outcomes[i] = Outcome.LEAKED_PROMPT

    def keep_smallest(numbers: Sequence[int | None], otherwise: Outcome) -> None:
        for source, number in enumerate(numbers):
            mine = sorted((i for i in admitted() if flat[i][0] == source), key=lambda i: flat[i][1].group_id)
            for i in mine[number:] if number is not None else []:
                outcomes[i] = otherwise

    keep_smallest(caps, Outcome.OVER_CAP)
    if None not in weights:
        counts = [sum(flat[i][0] == source for i in admitted()) for source in range(len(weights))]
        scarcest = min(Fraction(n) / Fraction(str(w)) for n, w in zip(counts, weights, strict=True))
        keep_smallest([int(Fraction(str(w)) * scarcest) for w in weights], Outcome.OUTSIDE_MIXTURE)
    return outcomes


def contents(given_shards: Sequence[Shard], outcomes: Sequence[Outcome], wanted: Outcome = Outcome.ADMITTED):
    flat = [(source, row) for source, of in given_shards for row in of]
    return Counter(row for row, outcome in zip(flat, outcomes, strict=True) if outcome == wanted)


@settings(deadline=None)
@given(shards, held_out_prompts, all_rules, all_caps, all_weights)
@example([(0, [Row(1, 1, 2), Row(2, 1, 2), Row(3, 1, 2)])], FALLING_HASHES, RulesConfig(), [None] * 3, [None] * 3)
def test_every_row_has_the_outcome_of_the_model(given_shards, prompts, rules, caps, weights):
    assert chosen_among(given_shards, prompts, rules, caps, weights) == model(
        given_shards, prompts, rules, caps, weights
    )


@settings(deadline=None)
@given(shards, held_out_prompts, all_rules, all_caps, all_weights)
def test_admitted_groups_are_unique_and_keep_the_rules(given_shards, prompts, rules, caps, weights):
    outcomes = chosen_among(given_shards, prompts, rules, caps, weights)
    admitted = contents(given_shards, outcomes)
    groups = Counter(row.group_id for _, row in admitted.elements())
    assert all(n == 1 for n in groups.values())
    if rules.conflicts == "drop":
        assert not any(row.opposite_id in groups for _, row in admitted)
    if prompts is not None and rules.leakage == "drop":
        assert not any(row.prompt in prompts for _, row in admitted)
    for source, cap in enumerate(caps):
        assert cap is None or sum(s == source for s, _ in admitted) <= cap


@settings(deadline=None)
@given(shards, st.randoms(use_true_random=False), held_out_prompts, all_rules, all_caps, all_weights)
def test_neither_the_order_of_shards_nor_that_of_rows_matters(given_shards, random, prompts, rules, caps, weights):
    others = [(source, random.sample(of, len(of))) for source, of in given_shards]
    random.shuffle(others)
    outcomes = chosen_among(given_shards, prompts, rules, caps, weights)
    other_outcomes = chosen_among(others, prompts, rules, caps, weights)
    for outcome in Outcome:
        assert contents(given_shards, outcomes, outcome) == contents(others, other_outcomes, outcome)


@settings(deadline=None)
@given(shards, st.tuples(st.integers(0, 2), st.lists(rows, max_size=12)), all_rules, all_caps)
def test_a_shard_that_is_added_changes_only_what_it_must(given_shards, added, rules, caps):
    none = [None] * 3
    before = contents(given_shards, chosen_among(given_shards, None, rules, none, none))
    after = contents([*given_shards, added], chosen_among([*given_shards, added], None, rules, none, none))
    new = {row.group_id for row in added[1]}
    gone = {row for _, row in before} - {row for _, row in after}
    assert all(row.opposite_id in new for row in gone)
    come = {row for _, row in after} - {row for _, row in before}
    assert {row.group_id for row in come} <= new
    # Under a cap, groups of before may make room for new ones, but none of them comes back.
    if rules.conflicts == "keep":
        before = contents(given_shards, chosen_among(given_shards, None, rules, caps, none))
        all_after = [*given_shards, added]
        after = contents(all_after, chosen_among(all_after, None, rules, caps, none))
        untouched = {s for s in range(3) if s < added[0]}
        assert {(s, row) for s, row in before if s in untouched} == {(s, row) for s, row in after if s in untouched}
        mine = {row for s, row in after if s == added[0] and row.group_id not in new}
        assert mine <= {row for s, row in before if s == added[0]}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.decimals("0.01", 9, places=2)), min_size=1, max_size=5))
def test_a_mixture_is_the_largest_in_the_proportions_of_its_weights(sources):
    counts, weights = [count for count, _ in sources], [Fraction(weight) for _, weight in sources]
    shares = mixture(counts, [float(weight) for _, weight in sources])
    assert all(0 <= share <= count for share, count in zip(shares, counts, strict=True))
    fullest = max(share / weight for share, weight in zip(shares, weights, strict=True))
    for share, weight in zip(shares, weights, strict=True):
        assert fullest * weight - 1 < share <= fullest * weight  # within one group of the proportions
    assert any(
        share == count and share / weight == fullest
        for share, count, weight in zip(shares, counts, weights, strict=True)
    )  # and a larger mixture would take a group that this source does not have


@pytest.mark.parametrize(
    ("counts", "weights", "shares"),
    [
        ([500, 300], [1, 1], [300, 300]),
        ([500, 300], [0.1, 0.3], [100, 300]),
        ([100, 500], [0.1, 0.3], [100, 300]),  # as binary fractions, 0.3 is less than three times 0.1
        ([500, 300, 1000], [2, 1, 4], [500, 250, 1000]),
        ([7, 0], [1000, 1], [0, 0]),
        ([7, 9], [None, None], [7, 9]),
        ([], [], []),
    ],
)
def test_mixtures_of_known_size(counts, weights, shares):
    assert mixture(counts, weights) == shares


def test_a_cap_takes_a_sample_that_is_fair_to_files():
    """Of hashed contents in two files of 5000, a cap of 1000 takes about 500 of each (a standard error of 15)."""
    ids = [hashlib.blake2b(i.to_bytes(4, "little"), digest_size=16).digest() for i in range(10_000)]
    of_ids = pa.table({"group_id": ids, "prompt_hash": ids, "opposite_id": [None] * len(ids)}, table([]).schema)
    outcomes = select(candidates([(0, of_ids[:5000]), (0, of_ids[5000:])]), None, RulesConfig(), [1000], [None])
    assert np.count_nonzero(outcomes == Outcome.ADMITTED) == 1000
    assert 425 < np.count_nonzero(outcomes[:5000] == Outcome.ADMITTED) < 575


def test_candidates_are_read_from_slices_and_chunks_with_nulls_among_them():
    of = [Row(1, 2, 3), Row(1, 2, 3, third=1), Row(0, 0, 1), Row(2, 1, 0)]
    chunked = pa.concat_tables([table(of)[1:3], table([]), table(of)[3:]])
    read = candidates([(4, table(of)[:1]), (5, chunked), (6, table([]))])
    assert [i.ljust(16, b"\0") for i in read.group_ids.tolist()] == [row.group_id for row in of]
    assert [i.ljust(16, b"\0") for i in read.prompt_hashes.tolist()] == [row.prompt_hash for row in of]
    expected = [row.opposite_id or row.group_id for row in of]
    assert [i.ljust(16, b"\0") for i in read.opposite_ids.tolist()] == expected
    assert read.source.tolist() == [4, 5, 5, 5]
    assert read.minhashes is None


def test_minhashes_are_read_and_missing_ones_refused():
    signatures = np.arange(2 * 128, dtype="<u2").reshape(2, 128)
    minhash = pa.array([row.tobytes() for row in signatures], pa.binary())
    two = table([Row(0, 1, 2), Row(1, 1, 2)])
    read = candidates(
        [(0, two.append_column("minhash", minhash)[1:]), (0, two[:0].append_column("minhash", minhash[:0]))]
    )
    assert read.minhashes is not None
    assert np.array_equal(read.minhashes, signatures[1:])
    with pytest.raises(ValueError, match="2 of 2 rows have no minhash"):
        candidates([(0, two.append_column("minhash", pa.nulls(2, pa.binary())))])
    with pytest.raises(ValueError, match="but the rows have none"):
        select(candidates([(0, two)]), None, RulesConfig(near_duplicates=0.8), [None], [None])


def test_near_duplicates_go_after_leaked_prompts_and_before_caps():
    """Rows 0, 1 and 2 are alike. The source that is named first keeps its own; a row that leaked hides no other."""
    of = [Row(0, 1, 2), Row(1, 1, 2), Row(2, 1, 2), Row(3, 1, 2)]
    signature = np.tile(np.arange(128, dtype="<u2"), (4, 1))
    signature[3] += 1000
    ids = candidates([(1, table(of[:1])), (0, table(of[1:]))])
    everything = Candidates(ids.group_ids, ids.prompt_hashes, ids.opposite_ids, ids.source, signature)
    leaked = np.array([of[1].prompt_hash], ID_DTYPE)
    outcomes = select(everything, leaked, RulesConfig(near_duplicates=0.9), [1, None], [None, None])
    assert [Outcome(o) for o in outcomes] == [
        Outcome.NEAR_DUPLICATE,
        Outcome.LEAKED_PROMPT,
        Outcome.ADMITTED,
        Outcome.OVER_CAP,
    ]


def test_outcomes_that_are_not_counted_as_duplicates_are_reason_codes():
    names = {outcome.name for outcome in Outcome} - {"ADMITTED", "DUPLICATE", "NEAR_DUPLICATE"}
    assert names <= REASONS.keys()
