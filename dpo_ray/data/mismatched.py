"""Adds a mismatched completion, that is, a completion of another prompt, to each group. KTO estimates the KL
divergence from these completions.

A mismatched completion is part of the data, so the reference model scores it like any other completion, once for all
runs, and the computation of the prompt is shared. Its score is NaN, so that no pair and no label uses this completion.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

MOST_TRIED = 16  # so many following groups are tried; if none fits, a group gets no mismatched completion


def with_mismatched(groups: pa.Table, max_length_tokens: int) -> pa.Table:
    """Append to each group (schema TOKENS) the first completion of another group.

    The groups are sorted by group id, so that their order does not depend on how they are spread over files. Each group
    gets the completion of the nearest following group that has another prompt, and whose completion fits: the group's
    prompt and this completion have at most `max_length_tokens` tokens. A group stays unchanged if none of the
    next 16 groups (MOST_TRIED) is suitable.
    """
    ids = groups["group_id"].to_pylist()
    prompts = [ids.values.to_numpy() for ids in groups["prompt_ids"]]
    completions = [[c.values.to_numpy() for c in cs.values] for cs in groups["completion_ids"]]
    firsts = [own[0] for own in completions]
    scores = groups["scores"].to_pylist()
    order = sorted(range(len(ids)), key=ids.__getitem__)
    for place, row in enumerate(order):
        for step in range(1, min(MOST_TRIED, len(order) - 1) + 1):
            other = order[(place + step) % len(order)]
            fits = len(prompts[row]) + len(firsts[other]) <= max_length_tokens
            if fits and not np.array_equal(prompts[row], prompts[other]):
                scores[row] = [*scores[row], float("nan")]
                completions[row] = [*completions[row], firsts[other]]
                break
    columns = {
        "completion_ids": pa.array(completions, groups.schema.field("completion_ids").type),
        "scores": pa.array(scores, groups.schema.field("scores").type),
    }
    for name, values in columns.items():
        groups = groups.set_column(groups.schema.get_field_index(name), groups.schema.field(name), values)
    return groups
