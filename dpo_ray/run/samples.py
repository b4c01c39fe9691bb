"""The comparison of policy and reference when an offline run is evaluated.

Completions are sampled from both models, and both models compute the log-prob of every completion (they score it).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.evaluate.metrics import Comparison, Sample
from dpo_ray.observe.progress import Bar
from dpo_ray.reference.completions import EngineModel, SampledCompletion, completion_logps, sample_completions
from dpo_ray.reference.engine import start_sampling_vllm
from dpo_ray.reference.pool import EnginePool
from dpo_ray.reference.sampling import Sampling, prompt_table

from .context import RunContext


def compare_models(
    run: RunContext, trained: Artifact, prompts: Sequence[Sequence[int]], stop_token_ids: tuple[int, ...], bar: Bar
) -> Comparison:
    """Sample a completion for every prompt from both models; compute each completion's log-prob under both models.

    One pool of engines does all the work. The engines load the reference, then the policy, then the reference again.

    Raises:
        EngineError: all engines die at the same prompt, or a log-prob of a completion is not finite.
    """
    config, granule = run.recipe.evaluate, run.recipe.reference.groups_per_granule
    sampling = Sampling(config.temperature, config.max_new_tokens, stop_token_ids)
    table = prompt_table(prompts, run.recipe.seed, 0, 1)
    reference, policy = run.reference_model(config.max_new_tokens), run.policy_model(trained, config.max_new_tokens)
    pool = EnginePool(
        reference.settings,
        reference.store,
        run.recipe.reference,
        run.plan.hardware.sampler,
        bar.say,
        start_sampling_vllm,
        living=True,
    )

    def score(model: EngineModel, samples: Sequence[SampledCompletion]) -> np.ndarray:
        return completion_logps(pool, model, prompts, [ids for ids, _ in samples], granule)

    try:
        of_reference = sample_completions(pool, reference, table, sampling, granule)
        reference_under_reference = score(reference, of_reference)
        of_policy = sample_completions(pool, policy, table, sampling, granule)
        policy_under_policy, reference_under_policy = score(policy, of_policy), score(policy, of_reference)
        bar.advance(len(prompts))
        policy_under_reference = score(reference, of_policy)
    finally:
        pool.close()
    return Comparison(
        tuple(map(tuple, prompts)),
        _samples(of_policy, policy_under_policy, policy_under_reference),
        _samples(of_reference, reference_under_policy, reference_under_reference),
    )


def _samples(
    sampled: Sequence[SampledCompletion], under_policy: np.ndarray, under_reference: np.ndarray
) -> tuple[Sample, ...]:
    scored = zip(sampled, under_policy.tolist(), under_reference.tolist(), strict=True)
    return tuple(Sample(ids, policy, reference, ended) for (ids, ended), policy, reference in scored)
