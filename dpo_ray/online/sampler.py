"""Sample completions with vLLM, and score them with the same engines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import ray

from dpo_ray.cluster.asks import Ask
from dpo_ray.errors import EngineError
from dpo_ray.evaluate.metrics import Comparison, Sample
from dpo_ray.reference.sampling import Sampling, sample_seed
from dpo_ray.reference.scorer import ScoreRequest, ScorerSettings
from dpo_ray.reference.vllm_scorer import VllmScorer

from .prompts import prompt_key


class SamplerActor:
    """One vLLM engine that samples, and scores what was sampled."""

    def __init__(self, settings: ScorerSettings) -> None:
        self._settings = settings

    @cached_property
    def _scorer(self) -> VllmScorer:
        """Start the engine with the first request: what a method raises reaches the driver, a constructor's error does not."""
        return VllmScorer(self._settings, enable_sampling=True)

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[tuple[list[int], bool]]:
        """Return, for each prompt, the sampled token ids and whether they end with a stop token.

        The seed of a sample is a hash of (run's seed, prompt), so it depends neither on order nor on batching.
        """
        seeds = [[sample_seed(seed, 0, prompt_key(prompt), 0)] for prompt in prompts]
        return [own[0] for own in self._scorer.sample(prompts, seeds, sampling)]

    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """Return the log-prob of each completion, summed over its tokens, in nats; 0 for an empty one.

        Raises:
            EngineError: the model gives a completion no finite log-probs.
        """
        kept = [i for i, c in enumerate(completions) if len(c)]
        requests = [ScoreRequest(i, np.array(prompts[i], np.int32), np.array(completions[i], np.int32)) for i in kept]
        sums = [0.0] * len(completions)
        for i, logps in zip(kept, self._scorer.score(requests), strict=True):
            if logps is None:
                raise EngineError(
                    "the model gives no finite log-probs for a sampled completion",
                    where=self._settings.model_dir,
                    fix="look at the model: training may have broken it",
                )
            sums[i] = float(logps.sum(dtype=np.float64))
        return sums


def compare(
    policy: ScorerSettings,
    reference: ScorerSettings,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    ask: Ask,
) -> Comparison:
    """Sample a completion of every prompt from both models, and score all of them under both; each engine asks for `ask`.

    Without GPUs the two engines start side by side. With GPUs each has the device for itself, one after the other, and
    the reference's is started again to score what the policy sampled.
    """
    gpus = ask.gpus
    actor = ray.remote(SamplerActor).options(**ask.options())
    samples: dict[str, list[tuple[list[int], bool]]] = {}
    logps: dict[tuple[str, str], list[float]] = {}
    first: Any = actor.remote(reference)
    second: Any = None if gpus else actor.remote(policy)
    pending: Any = None if gpus else second.sample.remote(prompts, sampling, seed)
    samples["reference"] = ray.get(first.sample.remote(prompts, sampling, seed))
    completions = {"reference": [ids for ids, _ in samples["reference"]]}
    logps["reference", "reference"] = ray.get(first.score.remote(prompts, completions["reference"]))
    if gpus:
        ray.kill(first)
        second = actor.remote(policy)
        pending = second.sample.remote(prompts, sampling, seed)
    samples["policy"] = ray.get(pending)
    completions["policy"] = [ids for ids, _ in samples["policy"]]
    for name in ("policy", "reference"):
        logps[name, "policy"] = ray.get(second.score.remote(prompts, completions[name]))
    ray.kill(second)
    if gpus:
        first = actor.remote(reference)
    logps["policy", "reference"] = ray.get(first.score.remote(prompts, completions["policy"]))
    ray.kill(first)

    def collected(name: str) -> tuple[Sample, ...]:
        under_policy, under_reference = logps[name, "policy"], logps[name, "reference"]
        return tuple(
            Sample(tuple(ids), p, r, ended)
            for (ids, ended), p, r in zip(samples[name], under_policy, under_reference, strict=True)
        )

    return Comparison(tuple(tuple(p) for p in prompts), collected("policy"), collected("reference"))
