"""A check of which layout computes an architecture exactly, before training depends on it.

Attention by segments is exact if tokens interact only in attention and positions come from `position_ids`. A model in
which neighbours interact in other ways (state-space layers, convolutions, ALiBi by row) would give wrong log-probs
without any error, so it gets a simpler layout.
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
from dpo_ray.errors import ConfigError
from dpo_ray.schedule.micro_batch import pack

from . import attention
from .packed_rows import Layout, packed_rows
from .token_logps import TokenLogps

logger = logging.getLogger(__name__)

# Families that the tests show to be exact; for these the probe would only cost a forward pass.
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
TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # per token; the errors of wrong models are tenths and more


@torch.no_grad()
def check_segments(policy: TokenLogps, where: str) -> None:
    """Set the model's attention so that `policy.layout` is exact, or choose the next simpler layout that is exact.

    Log-probs of a few random tokens are compared with the model's own forward pass on each single sequence. If
    attention by segments differs, the model's own attention is tried, which finds the sequences of a packed row by
    their positions. If that differs too (state-space layers, ALiBi by row), each sequence gets its own padded row.

    Raises:
        ConfigError: log-probs differ in padded rows too, or tokens see the tokens that follow them.
    """
    model_type = policy.model.config.model_type
    if getattr(policy.model.config, "use_bidirectional_attention", None) is True:
        raise _refused(model_type, "its tokens see the tokens that follow them (use_bidirectional_attention)", where)
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
                problems.append(f"{layout} {'by segments' if by_segments else 'by its own attention'}: {problem}")
            else:
                raise _refused(model_type, "; ".join(problems), where)
    finally:
        policy.train()
    if problems:
        kept = (
            f"the layout is {policy.layout} in place of {wanted}" if policy.layout != wanted else "attention is its own"
        )
        logger.warning("%s: for the architecture `%s` %s (%s)", where, model_type, kept, "; ".join(problems))


def _ways(wanted: Layout) -> list[tuple[Layout, bool]]:
    """List layouts from the wanted one to the simplest, each with whether attention is by segments."""
    if wanted == "padded":
        return [("padded", False)]
    return [(wanted, True), ("packed", False), ("padded", False)]


def _problem(policy: TokenLogps, by_segments: bool, groups: list[Group], expected: Tensor) -> str | None:
    """Return the problem of log-probs in the policy's layout, or None if they match `expected`, float32 [rows]."""
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
    """Set attention by segments, or the model's own: PyTorch's kernels, or the eager one if the model needs it."""
    if by_segments:
        model.set_attn_implementation(attention.IMPLEMENTATION)
        return
    # Transformers' `sdpa` silently omits the soft cap of scores (Gemma 2).
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    try:
        model.set_attn_implementation("eager" if softcap else "sdpa")
    except ValueError:  # the architecture does not support it
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
    """Score every completion separately with the model's own attention: float32 [rows], in packed order.

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
                raise _refused(policy.model.config.model_type, str(error).splitlines()[0], where) from error
            at = torch.arange(len(group.prompt_ids) - 1, len(ids) - 1)
            rows.append(logits.log_softmax(-1)[at, ids[len(group.prompt_ids) :]])
    return torch.cat(rows)


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten all attention windows temporarily: else a model that applies them only in masks would pass the probe."""
    holders: list[Any] = [model.config, model.config.get_text_config(), *model.modules()]
    windows = [(h, name, getattr(h, name)) for h in holders for name in WINDOWS if type(getattr(h, name, None)) is int]
    try:
        for holder, name, _ in windows:
            setattr(holder, name, PROBE_WINDOW)
        yield
    finally:
        for holder, name, window in windows:
            setattr(holder, name, window)


def _refused(model_type: str, reason: str, where: str) -> ConfigError:
    return ConfigError(
        f"the architecture `{model_type}` cannot be trained: {reason}",
        where=where,
        fix="use a decoder whose tokens interact only in attention, such as Llama, Mistral, Qwen, Gemma, Phi",
    )
