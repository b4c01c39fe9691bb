"""The stage `evaluate` of a round: it compares the new policy with the previous policy and with the initial policy.

All three policies complete the same held-out prompts, and a judge compares the completions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.tables import read_table
from dpo_ray.config.online import RoundEvaluationConfig
from dpo_ray.errors import EngineError
from dpo_ray.evaluate.diversity import distinct_n, mean_tokens, unigram_entropy
from dpo_ray.evaluate.metrics import heldout_figures
from dpo_ray.evaluate.stage import TrueReward
from dpo_ray.evaluate.win_rate import WinRate, mean_difference, win_rate
from dpo_ray.online.judges.protocol import Question, Usage, Verdict

from .promotion import RoundFigures
from .sample import read_samples

Ask = Callable[[Sequence[Question]], tuple[list[Verdict], Usage]]


@dataclass(frozen=True)
class PolicySamples:
    """The completions that one policy sampled for all held-out prompts. All lists are in the order of the prompts."""

    prompt_ids: list[tuple[int, ...]]
    completion_ids: list[tuple[int, ...]]
    ended: list[bool]
    texts: list[str]
    rewards: list[float] | None  # the true rewards; None: they are not known


@dataclass(frozen=True)
class Compared:
    """The win rate of one policy against another, with its interval; and the cost of the judge's answers."""

    rate: WinRate
    usage: Usage


def policy_samples(
    sampled: Artifact, prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, reward: TrueReward | None
) -> PolicySamples:
    """Read the completions of the held-out prompts, one per prompt, from an artifact `sample`.

    Args:
        prompts: the texts of the prompts.
        reward: computes the true reward of a prompt and a completion; None if there is no such function.

    Raises:
        EngineError: a prompt has no completion, because engines died repeatedly while they sampled for this prompt.
    """
    by_prompt = {p.prompt_ids: p for p in read_samples(sampled)}
    if len(by_prompt) < len(prompts):
        raise EngineError(
            f"{len(prompts) - len(by_prompt)} held-out prompts have no sample: engines died repeatedly while sampling",
            where="online.evaluate",
            fix="remove the rows of these prompts from data.eval, or give the engines more memory; `--verbose` shows their logs",
        )
    ids = list(by_prompt)
    completions = [p.completion_ids[0] for p in by_prompt.values()]
    texts = [str(tokenizer.decode(list(c), skip_special_tokens=True)) for c in completions]
    rewards = None if reward is None else [reward(p, t) for p, t in zip(prompts, texts, strict=True)]
    return PolicySamples(ids, completions, [p.ended[0] for p in by_prompt.values()], texts, rewards)


def compare(
    prompts: Sequence[str],
    ours: PolicySamples,
    theirs: PolicySamples,
    ask: Ask,
    config: RoundEvaluationConfig,
    seed: int,
) -> Compared:
    """Compare the completions of two policies, prompt by prompt, with a judge. Return how often `ours` wins.

    Args:
        ask: passes questions to the judge.
        seed: seed of the bootstrap for the interval.
    """
    pairs = zip(prompts, ours.texts, theirs.texts, strict=True)
    verdicts, usage = ask([Question(prompt, (a, b)) for prompt, a, b in pairs])
    a, b = ([v.scores[side] for v in verdicts] for side in (0, 1))
    return Compared(win_rate(a, b, config.bootstrap_samples, config.confidence, seed), usage)


def figures_of(
    samples: PolicySamples,
    initial: PolicySamples,
    previous: PolicySamples,
    kl: np.ndarray,
    config: RoundEvaluationConfig,
    seed: int,
) -> dict[str, Any]:
    """Compute all metrics of a round's policy that need no judge.

    Args:
        samples, initial, previous: completions by the round's policy, by the initial and by the previous policy.
        kl: for each completion of `samples`, its log-prob under the round's policy minus that under the initial policy.
        seed: seed of the bootstrap for intervals.
    """
    figures: dict[str, Any] = {
        "prompts": len(samples.texts),
        "kl": float(kl.mean()),
        "kl_standard_error": float(kl.std(ddof=1) / len(kl) ** 0.5) if len(kl) > 1 else 0.0,
        "initial_mean_tokens": mean_tokens(initial.completion_ids),
        **sample_figures(samples),
    }
    if samples.rewards is not None and previous.rewards is not None:
        gain = mean_difference(samples.rewards, previous.rewards, config.bootstrap_samples, config.confidence, seed)
        figures |= {"true_reward_gain": gain.mean, "true_reward_gain_interval": [gain.low, gain.high]}
    return figures


def sample_figures(samples: PolicySamples) -> dict[str, float | None]:
    """Compute length, diversity and mean true reward of a policy's completions. A metric that is not known is None."""
    return {
        "mean_tokens": mean_tokens(samples.completion_ids),
        "distinct_2": distinct_n(samples.completion_ids, 2),
        "entropy": unigram_entropy(samples.completion_ids),
        "truncated_fraction": 1 - sum(samples.ended) / len(samples.ended),
        "true_reward": None if samples.rewards is None else float(np.mean(samples.rewards)),
    }


def round_figures(figures: dict[str, Any]) -> RoundFigures:
    """Select the metrics that decide whether a round's policy is promoted and whether the rounds stop."""
    heldout = figures.get("heldout") or {}
    return RoundFigures(
        win_rate_against_previous=figures["against_previous"]["rate"],
        win_rate_against_initial=figures["against_initial"]["rate"],
        true_reward=figures["true_reward"],
        true_reward_gain=figures.get("true_reward_gain"),
        kl=figures["kl"],
        heldout_accuracy=heldout.get("rewards/accuracies"),
        mean_tokens=figures["mean_tokens"],
        initial_mean_tokens=figures["initial_mean_tokens"],
        distinct_2=figures["distinct_2"],
        entropy=figures["entropy"],
    )


def commit(
    trained: Artifact,
    prompts: Sequence[str],
    samples: PolicySamples,
    initial: PolicySamples,
    against: dict[str, Compared],
    figures: dict[str, Any],
    staging: Staging,
    provenance: Provenance,
) -> Artifact:
    """Commit the artifact `measure`: all metrics, and the completions of the new and of the initial policy."""
    usage = sum((c.usage for c in against.values()), Usage())
    whole = figures | {name: asdict(c.rate) for name, c in against.items()} | {"usage": vars(usage)}
    if "heldout.parquet" in trained.names():
        whole["heldout"] = heldout_figures(read_table(trained, "heldout.parquet"))
    columns = {
        "prompt": prompts,
        "completion": samples.texts,
        "true_reward": samples.rewards or [None] * len(prompts),
        "initial_completion": initial.texts,
        "initial_true_reward": initial.rewards or [None] * len(prompts),
    }
    lines = [json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in zip(*columns.values(), strict=True)]
    entry = staging.write("samples.jsonl", "".join(lines).encode(), rows=len(lines))
    return provenance.commit(staging, [entry], rows={"samples": len(lines)}, figures=whole)
