"""The stage `evaluate`: metrics of the trained policy on held-out data, and a comparison with the reference."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.tables import read_table
from dpo_ray.data.schemas import eval_splits

from .metrics import Comparison, heldout_by_set, heldout_figures, reward_figures, sample_figures

TrueReward = Callable[[str, str], float]


def heldout_prompts(tokens: Artifact, count: int, longest_tokens: int | None) -> list[list[int]]:
    """Choose up to `count` different prompts from the held-out sets of a tokens artifact.

    The sets take turns: each set contributes one prompt at a time, until all its prompts are used.

    Args:
        longest_tokens: longer prompts are skipped, because no tokens would be left for a completion; None: no limit.
    """
    prompts: dict[tuple[int, ...], None] = {}
    sets = deque(_prompts(tokens, split) for split in eval_splits(tokens))
    while sets and len(prompts) < count:
        own = sets.popleft()
        fitting = (p for p in own if p not in prompts and (longest_tokens is None or len(p) <= longest_tokens))
        if (prompt := next(fitting, None)) is not None:
            prompts[prompt] = None
            sets.append(own)
    return [list(p) for p in prompts]


def _prompts(tokens: Artifact, split: str) -> Iterator[tuple[int, ...]]:
    for name in tokens.names(f"{split}/"):
        for ids in read_table(tokens, name, ["prompt_ids"])["prompt_ids"].to_pylist():
            yield tuple(ids)


def run(
    trained: Artifact,
    comparison: Comparison | None,
    true_reward: TrueReward | None,
    tokenizer: PreTrainedTokenizerBase,
    staging: Staging,
    provenance: Provenance,
) -> Artifact:
    """Compute all metrics and commit the artifact `evaluate`.

    Args:
        trained: the artifact `train`.
        comparison: completions of both models; None: nothing was sampled.
        true_reward: a function that computes the true reward from a prompt and a completion; None: there is no such
            function.
    """
    figures: dict[str, Any] = {}
    entries = []
    if "heldout.parquet" in trained.names():
        pairs = read_table(trained, "heldout.parquet")
        figures["heldout"] = heldout_figures(pairs)
        if by_set := heldout_by_set(pairs):
            figures["heldout_sets"] = by_set
    if comparison is not None:
        texts = sample_rows(comparison, tokenizer, true_reward)
        figures["samples"] = sample_figures(comparison)
        if true_reward is not None:
            figures["samples"] |= reward_figures(
                [t["policy_score"] for t in texts], [t["reference_score"] for t in texts]
            )
        lines = "".join(json.dumps(t) + "\n" for t in texts)
        entries.append(staging.write("samples.jsonl", lines.encode(), rows=len(texts)))
    entries.append(staging.write("figures.json", json.dumps(figures, indent=1).encode()))
    rows = {"samples": len(comparison.policy) if comparison else 0}
    return provenance.commit(staging, entries, rows=rows, figures=figures)


def sample_rows(
    comparison: Comparison, tokenizer: PreTrainedTokenizerBase, true_reward: TrueReward | None
) -> list[dict[str, Any]]:
    """Build one row per prompt: the texts of the prompt and of both completions, and if possible the true rewards."""
    rows = []
    for prompt_ids, policy, reference in zip(
        comparison.prompt_ids, comparison.policy, comparison.reference, strict=True
    ):
        prompt = str(tokenizer.decode(list(prompt_ids), skip_special_tokens=True))
        texts = {
            name: str(tokenizer.decode(list(s.token_ids), skip_special_tokens=True))
            for name, s in (("policy", policy), ("reference", reference))
        }
        row: dict[str, Any] = {"prompt": prompt, **texts, "kl": policy.policy_logp - policy.reference_logp}
        if true_reward is not None:
            row |= {f"{name}_score": true_reward(prompt, text) for name, text in texts.items()}
        rows.append(row)
    return rows
