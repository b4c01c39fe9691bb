"""See that an architecture can be computed over packed groups, before any training depends on it.

Attention by segments is exact where tokens meet in attention alone and positions come from `position_ids`. A model that
mixes neighbours otherwise (state-space layers, convolutions, ALiBi by row) would give wrong log-probs without any error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_ray.errors import ConfigError
from dpo_ray.schedule.micro_batch import Group, pack

from . import shared_prefix
from .packed_rows import packed_rows
from .token_logps import TokenLogps

# Families whose exactness the tests show; the probe would only cost them a forward pass.
KNOWN_EXACT = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
        *("granite", "cohere"),
    }
)
WINDOWS = ("sliding_window", "attention_chunk_size")
PROBE_WINDOW = 3  # tokens; shorter than the probe's sequences
TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # of a token; wrong models are off by tenths and more


@torch.no_grad()
def check_segments(policy: TokenLogps, where: str) -> None:
    """Compare packed log-probs of a few random tokens with the model's own forward pass of each sequence alone.

    Raises:
        ConfigError: they differ, or the model does not take packed rows at all.
    """
    model_type = policy.model.config.model_type
    if getattr(policy.model.config, "use_bidirectional_attention", None) is True:
        raise _refused(model_type, "its tokens see those that follow them (use_bidirectional_attention)", where)
    if model_type in KNOWN_EXACT:
        return
    random = np.random.default_rng(0)
    vocabulary = policy.model.config.get_text_config().vocab_size
    prompts = [random.integers(0, vocabulary, n, dtype=np.int32) for n in (5, 3)]
    completions = [
        tuple(random.integers(0, vocabulary, n, dtype=np.int32) for n in lengths) for lengths in ((4, 3), (2, 4))
    ]
    groups = [Group(bytes(16), p, c, np.array([1, 0], np.float32)) for p, c in zip(prompts, completions, strict=True)]
    policy.eval()
    try:
        with _short_windows(policy.model):
            packed = policy(packed_rows(pack(groups))).logps
            own = _alone(policy, groups)
        difference = float((packed - own).abs().max())
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise _refused(model_type, str(error).splitlines()[0], where) from error
    finally:
        policy.train()
    if not difference <= TOLERANCE_NATS[policy.model.dtype]:
        raise _refused(model_type, f"packed log-probs are off by {difference:.2g} nats a token", where)


def _alone(policy: TokenLogps, groups: list[Group]) -> Tensor:
    """Score every completion by itself with the model's own attention: float32 [rows], in the packed order."""
    rows = []
    policy.model.set_attn_implementation("eager")
    try:
        for group in groups:
            for completion in group.completion_ids:
                ids = torch.from_numpy(np.concatenate([group.prompt_ids, completion]).astype(np.int64))
                logps = policy.model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
                at = torch.arange(len(group.prompt_ids) - 1, len(ids) - 1)
                rows.append(logps[at, ids[len(group.prompt_ids) :]])
    finally:
        policy.model.set_attn_implementation(shared_prefix.IMPLEMENTATION)
    return torch.cat(rows)


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten all windows for a while, or a model that has them in its masks alone, which packed rows do without, passes."""
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
        f"the architecture `{model_type}` cannot be trained in packed groups: {reason}",
        where=where,
        fix="use a decoder whose tokens meet in attention alone, such as Llama, Mistral, Qwen, Gemma, Phi",
    )
