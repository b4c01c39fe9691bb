"""Checks, before training, with which layout of a packed row a model computes exact log-probs.

Attention by segments (each prompt and completion separately) is exact if tokens interact only in attention, and if positions
come from `position_ids`. In other models, neighbouring tokens also interact elsewhere (state-space layers, convolutions), or
positions are counted along the row (ALiBi). The log-probs of these models would be wrong without any error, so a simpler layout
is used for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_ray.data.groups import Group
from dpo_ray.schedule.micro_batch import pack

from . import attention
from .architecture import check_attention, refused
from .packed_rows import Layout, packed_rows
from .token_logps import TokenLogps

logger = logging.getLogger(__name__)

# Families for which tests show that all layouts are exact; for these the probe would only cost a forward pass.
KNOWN_EXACT = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
        *("granite", "cohere"),
    }
)
# Exceptions of models that do not accept this input; their messages are reported.
FAILURES = (ValueError, TypeError, AttributeError, RuntimeError, IndexError)
WINDOWS = ("sliding_window", "attention_chunk_size")
PROBE_WINDOW = 3  # tokens; shorter than the probe's sequences
TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # per token; a wrong layout causes errors of tenths or more


@torch.no_grad()
def check_segments(policy: TokenLogps, where: str) -> None:
    """Set the model's attention so that log-probs in `policy.layout` are exact, or else choose a simpler layout.

    Log-probs of a few random tokens are compared with those of the model's own forward pass on each single sequence. Attention
    by segments (each prompt and completion separately) is tried first. If log-probs differ, the model's own attention is
    tried, which finds the sequences of a packed row by their positions. If log-probs differ again (state-space layers, ALiBi),
    each sequence gets its own padded row.

    Raises:
        ConfigError: log-probs also differ in padded rows, or tokens can see the tokens that follow them.
    """
    model_type = policy.model.config.model_type
    check_attention(policy.model.config, where)
    if model_type in KNOWN_EXACT:
        _set_attention(policy.model, by_segments=policy.layout != "padded")
        return
    wanted, problems = policy.layout, []
    groups = _random_groups(policy)
    policy.eval()
    try:
        with _short_windows(policy.model):
            alone = _alone(policy, groups, where)
            for layout, by_segments in _ways(wanted):
                policy.layout = layout
                problem = _problem(policy, by_segments, groups, alone)
                if problem is None:
                    break
                problems.append(
                    f"{layout} with {'attention by segments' if by_segments else 'its own attention'}: {problem}"
                )
            else:
                raise refused(model_type, "; ".join(problems), where)
    finally:
        policy.train()
    if problems:
        kept = (
            f"uses the layout {policy.layout} instead of {wanted}"
            if policy.layout != wanted
            else "uses the model's own attention"
        )
        logger.warning("%s: the architecture `%s` %s (%s)", where, model_type, kept, "; ".join(problems))


def _ways(wanted: Layout) -> list[tuple[Layout, bool]]:
    """List the layouts to try, from the wanted layout to the simplest one.

    The bool of a layout is True for attention by segments (each prompt and completion separately), and False for the model's
    own attention.
    """
    if wanted == "padded":
        return [("padded", False)]
    return [(wanted, True), ("packed", False), ("padded", False)]


def _problem(policy: TokenLogps, by_segments: bool, groups: list[Group], expected: Tensor) -> str | None:
    """Compare log-probs in the policy's layout with `expected`, float32 [rows].

    Return None if the log-probs match, otherwise a description of the problem.
    """
    try:
        _set_attention(policy.model, by_segments)
        rows = packed_rows(pack(groups), policy.model.device, policy.layout)
        difference = float((policy(rows).logps - expected).abs().max())
    except FAILURES as error:
        return str(error).splitlines()[0]
    if difference <= TOLERANCE_NATS[policy.model.dtype]:
        return None
    return f"log-probs differ by up to {difference:.2g} nats per token"


def _set_attention(model: PreTrainedModel, by_segments: bool) -> None:
    """Set attention by segments, or the model's own attention.

    The model's own attention uses PyTorch's kernels if they support the model, and eager code otherwise.
    """
    if by_segments:
        model.set_attn_implementation(attention.IMPLEMENTATION)
        return
    # Transformers' `sdpa` silently omits the soft cap of scores (Gemma 2).
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    try:
        model.set_attn_implementation("eager" if softcap else "sdpa")
    except ValueError:  # the architecture does not support PyTorch's kernels
        model.set_attn_implementation("eager")


def _random_groups(policy: TokenLogps) -> list[Group]:
    random = np.random.default_rng(0)
    vocabulary = policy.model.config.get_text_config().vocab_size
    prompts = [random.integers(0, vocabulary, n, dtype=np.int32) for n in (5, 3)]
    completions = [
        tuple(random.integers(0, vocabulary, n, dtype=np.int32) for n in lengths) for lengths in ((4, 3), (2, 4))
    ]
    return [Group(bytes(16), p, c, np.array([1, 0], np.float32)) for p, c in zip(prompts, completions, strict=True)]


def _alone(policy: TokenLogps, groups: list[Group], where: str) -> Tensor:
    """Compute the log-probs of each completion in a forward pass of its own: float32 [rows], in packed order.

    Raises:
        ConfigError: the model's forward pass fails.
    """
    rows = []
    policy.model.set_attn_implementation("eager")
    for group in groups:
        for completion in group.completion_ids:
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, completion]).astype(np.int64))
            ids = ids.to(policy.model.device)
            try:
                logits = policy.model(input_ids=ids[None], use_cache=False).logits[0].float()
            except FAILURES as error:
                raise refused(policy.model.config.model_type, str(error).splitlines()[0], where) from error
            at = torch.arange(len(group.prompt_ids) - 1, len(ids) - 1)
            rows.append(logits.log_softmax(-1)[at, ids[len(group.prompt_ids) :]])
    return torch.cat(rows)


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten all attention windows inside the `with` block, so that the short sequences of the probe exceed them.

    With the full windows, a model that applies its windows only in masks would wrongly pass the probe.
    """
    holders: list[Any] = [model.config, model.config.get_text_config(), *model.modules()]
    windows = [(h, name, getattr(h, name)) for h in holders for name in WINDOWS if type(getattr(h, name, None)) is int]
    try:
        for holder, name, _ in windows:
            setattr(holder, name, PROBE_WINDOW)
        yield
    finally:
        for holder, name, window in windows:
            setattr(holder, name, window)
