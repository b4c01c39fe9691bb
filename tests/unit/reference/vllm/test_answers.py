"""What is asked of vLLM and how its answers are read, for the runner that this machine may not have."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.errors import EngineError
from dpo_ray.reference.scorer import ScoreRequest
from dpo_ray.reference.vllm.scorer import (
    probe_group,
    read_flat,
    read_token_ids,
    sharing_fault,
    side_by_side,
    token_id_parameters,
)


def request(group: int, prompt_tokens: int, completion_tokens: int) -> ScoreRequest:
    return ScoreRequest(group, np.arange(prompt_tokens, dtype=np.int32), np.arange(completion_tokens, dtype=np.int32))


def test_the_v2_runner_is_asked_for_the_completion_alone() -> None:
    """vLLM's own SamplingParams takes the parameters; it wants prompt_len - 1 - start rows."""
    from vllm import SamplingParams

    table = np.arange(50, dtype=np.int32)
    asked = SamplingParams(**token_id_parameters(ScoreRequest(0, table[:7], table[10:30:4]), read_cache=True))
    assert asked.prompt_logprob_token_ids is not None
    assert np.asarray(asked.prompt_logprob_token_ids).tolist() == [[10], [14], [18], [22], [26]]
    assert np.asarray(asked.prompt_logprob_token_ids).dtype == np.int32
    assert asked.prompt_logprob_start == 6
    assert len(asked.prompt_logprob_token_ids) == (7 + 5) - 1 - asked.prompt_logprob_start
    assert asked.prompt_logprobs is None
    assert asked.skip_reading_prefix_cache is False
    assert asked.max_tokens == 1
    uncached = SamplingParams(**token_id_parameters(request(0, 7, 5), read_cache=False))
    assert uncached.skip_reading_prefix_cache is True


def test_reading_an_answer_of_the_v2_runner() -> None:
    ids = [1, 2, 3, 4, 5]
    logps = np.array([[-1.5], [-0.25]], np.float32)
    read = read_token_ids(SimpleNamespace(prompt_token_id_logprobs=logps, prompt_token_ids=ids), ids, 2)
    assert read is not None
    assert read.tolist() == [-1.5, -0.25]
    assert read_token_ids(SimpleNamespace(prompt_token_id_logprobs=None, prompt_token_ids=ids), ids, 2) is None
    for wrong in (logps[:1], np.repeat(logps, 2, axis=1), logps[:, 0]):
        with pytest.raises(EngineError, match="other tokens"):
            read_token_ids(SimpleNamespace(prompt_token_id_logprobs=wrong, prompt_token_ids=ids), ids, 2)
    with pytest.raises(EngineError, match="other tokens"):
        read_token_ids(SimpleNamespace(prompt_token_id_logprobs=logps, prompt_token_ids=[1, 2, 3, 4, 6]), ids, 2)


def test_a_flat_answer_is_read_from_its_end() -> None:
    """Where a prompt's beginning was in the cache, its entries are missing (V2) or mean nothing (V1)."""
    flat = SimpleNamespace(token_ids=[0, 3, 4, 5], logprobs=[9e9, -3.0, -4.0, -5.0])
    answer = SimpleNamespace(prompt_logprobs=flat)
    assert read_flat(answer, [1, 2, 3, 4, 5], 2).tolist() == [-4.0, -5.0]
    for ids, tokens in (([1, 2, 3, 4, 6], 1), ([1, 2, 3, 4, 5], 4)):
        with pytest.raises(EngineError, match="other tokens"):
            read_flat(answer, ids, tokens)
    with pytest.raises(EngineError, match="other tokens"):
        read_flat(SimpleNamespace(prompt_logprobs=None), [1, 2], 1)


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(1, 40)),
        max_size=30,
    )
)
def test_groups_stay_together_and_the_longest_go_first(shapes: list[tuple[int, int, int]]) -> None:
    requests = [request(*shape) for shape in shapes]
    order = side_by_side(requests)
    assert sorted(order) == list(range(len(requests)))
    groups = [requests[i].group for i in order]
    changes = [g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g]
    assert len(changes) == len(set(changes))
    longest = [max(p + c for g, p, c in shapes if g == group) for group in changes]
    assert longest == sorted(longest, reverse=True)


@given(block=st.sampled_from([16, 32, 128]), longest=st.integers(2, 1000), vocabulary=st.integers(16, 300_000))
def test_the_made_up_group_fits_and_can_only_share_its_prompt(block: int, longest: int, vocabulary: int) -> None:
    probe = probe_group(block, longest, vocabulary)
    if not probe:
        assert longest < 2 * block
        return
    first, second = probe
    assert first.prompt_ids is second.prompt_ids
    assert len(first.prompt_ids) > block
    for completion in (first.completion_ids, second.completion_ids):
        assert len(first.prompt_ids) + len(completion) <= longest
        assert completion.min() >= 0
        assert completion.max() < vocabulary
    assert first.completion_ids[0] != second.completion_ids[0]


def test_what_is_wrong_with_sharing() -> None:
    right = [np.array([-1.0, -2.0], np.float32), np.array([-3.0], np.float32)]
    near = [right[0] - 5e-5, right[1]]
    far = [right[0], right[1] - 3e-4]
    assert sharing_fault(near, right, 96, tolerance=1e-4) is None
    assert "differ by 0.0003 nats" in str(sharing_fault(far, right, 96, tolerance=1e-4))
    assert "does not find a prompt" in str(sharing_fault(near, right, 0, tolerance=1e-4))
    assert "beyond the prompt" in str(sharing_fault([right[0], None], right, 96, tolerance=1e-4))
    assert "random text" in str(sharing_fault(near, [None, right[1]], 96, tolerance=1e-4))
