"""A micro-batch's log-probs are cut into the groups and completions they were packed from."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.data.groups import Group
from dpo_ray.schedule.audit_pairs import compared_groups
from dpo_ray.schedule.files import filler
from dpo_ray.schedule.micro_batch import pack

lengths = st.lists(st.integers(1, 4), min_size=1, max_size=4)  # of a group's completions


def made(number: int, prompt: int, completions: list[int], pairs: list[tuple[int, int]], weight: float = 1.0) -> Group:
    chosen, rejected = np.array(pairs, np.int32).reshape(-1, 2).T
    reference = tuple(np.arange(n, dtype=np.float32) + 100 * number + 10 * k for k, n in enumerate(completions))
    return Group(
        number.to_bytes(16, "big"),
        np.zeros(prompt, np.int32),
        tuple(np.zeros(n, np.int32) for n in completions),
        np.zeros(len(completions), np.float32),
        chosen,
        rejected,
        weight=weight,
        reference_token_logps=reference,
    )


@given(st.lists(st.tuples(st.integers(1, 3), lengths), min_size=1, max_size=4), st.data())
def test_every_group_gets_back_what_it_was_packed_from(
    shapes: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    groups = []
    for number, (prompt, completions) in enumerate(shapes):
        places = st.integers(0, len(completions) - 1)
        pairs = data.draw(st.lists(st.tuples(places, places), max_size=3))
        groups.append(made(number, prompt, completions, pairs))
    micro_batch = pack(groups)
    own = -micro_batch.reference_token_logps
    for group, compared in zip(groups, compared_groups(micro_batch, own), strict=True):
        assert compared.group_id == group.group_id
        assert [c.tolist() for c in compared.stored] == [c.tolist() for c in group.reference_token_logps or ()]
        assert [c.tolist() for c in compared.own] == [(-c).tolist() for c in compared.stored]
        assert compared.chosen.tolist() == group.chosen.tolist()
        assert compared.rejected.tolist() == group.rejected.tolist()


def test_fillers_are_left_out() -> None:
    assert compared_groups(filler(), np.zeros(2, np.float32)) == []
    mixed = pack([made(1, 2, [1, 1], [(0, 1)], weight=0), made(2, 2, [2], [])])
    assert [g.group_id[-1] for g in compared_groups(mixed, np.zeros(4, np.float32))] == [2]
