"""The exact scorer: what it returns is what a plain forward pass gives, in the order asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_ray.models.builtin import builtin_model
from dpo_ray.reference.scorer import ScoreRequest, ScorerSettings
from dpo_ray.reference.trainer_scorer import TrainerScorer

MODEL = builtin_model("sentiment_llama")


def settings(max_batched_tokens: int) -> ScorerSettings:
    return ScorerSettings("trainer", str(MODEL), "float32", "cpu", 256, max_batched_tokens, 0.9, True)


def requests() -> list[ScoreRequest]:
    """Interleave groups, and let one group number come with two prompts."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 700, n, dtype=np.int32) for n in (7, 1, 12)]
    plan = [(0, 0, 4), (1, 1, 1), (0, 0, 9), (2, 2, 3), (1, 1, 6), (0, 2, 5), (2, 2, 1), (0, 0, 4)]
    return [ScoreRequest(g, prompts[p], rng.integers(3, 700, n, dtype=np.int32)) for g, p, n in plan]


@torch.no_grad()
def plain(asked: list[ScoreRequest]) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    results = []
    for r in asked:
        ids = torch.tensor(np.concatenate([r.prompt_ids, r.completion_ids]), dtype=torch.int64)[None]
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        results.append(logps[len(r.prompt_ids) - 1 :].numpy())
    return results


@pytest.mark.parametrize("max_batched_tokens", [8, 40, 4096])
def test_scores_are_those_of_a_plain_forward(max_batched_tokens: int) -> None:
    scorer, asked = TrainerScorer(settings(max_batched_tokens)), requests()
    scores = scorer.score(asked)
    assert [len(s) for s in scores] == [len(r.completion_ids) for r in asked]
    for actual, expected in zip(scores, plain(asked), strict=True):
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    assert scorer.score([]) == []
    scorer.close()
