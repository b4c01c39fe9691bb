"""Tiny random models of several families, their plain Hugging Face forward, and groups that try the packed layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from dpo_ray.data.groups import Group


@dataclass(frozen=True)
class Size:
    """How large to make a model. Windows are shorter than the sequences that go with it, so they are felt."""

    vocabulary: int
    hidden: int
    head_dim: int
    context: int
    window: int

    @property
    def common(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden // 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": self.context,
            # Large weights: scores and logits that differ much, so that a wrong mask, window or softcap shows.
            "initializer_range": (2 / self.hidden) ** 0.5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


TINY = Size(vocabulary=61, hidden=32, head_dim=8, context=64, window=5)
# vLLM wants heads of 32 and more on CPU; its cache blocks of 32 tokens want longer prompts and windows off their bounds.
SERVED = Size(vocabulary=509, hidden=128, head_dim=32, context=192, window=41)
VOCABULARY = TINY.vocabulary


def family_config(name: str, size: Size = TINY) -> PreTrainedConfig:
    """Configure the small model of a family: grouped queries, heads tied and not, windows, soft caps, norms, biases."""
    common, head_dim, window = size.common, size.head_dim, size.window
    mixed_layers = ["sliding_attention", "full_attention"]
    match name:
        case "llama":
            return LlamaConfig(**common, num_key_value_heads=2, tie_word_embeddings=False)
        case "llama3":  # rotations slowed down for a longer context, as from 3.1 on
            rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": size.context // 4}
            return LlamaConfig(**common, num_key_value_heads=1, rope_parameters=rope, tie_word_embeddings=True)
        case "qwen2":  # queries, keys and values have biases
            return Qwen2Config(**common, num_key_value_heads=2, tie_word_embeddings=True)
        case "qwen3":  # heads wider than hidden / heads, normed queries and keys
            return Qwen3Config(**common, num_key_value_heads=2, head_dim=2 * head_dim, tie_word_embeddings=False)
        case "mistral":
            return MistralConfig(**common, num_key_value_heads=2, sliding_window=window, tie_word_embeddings=False)
        case "gemma":
            return GemmaConfig(**common, num_key_value_heads=1, head_dim=head_dim, tie_word_embeddings=True)
        case "gemma2":
            return Gemma2Config(
                **common,
                num_key_value_heads=2,
                head_dim=head_dim,
                query_pre_attn_scalar=head_dim,
                sliding_window=window,
                layer_types=mixed_layers,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                tie_word_embeddings=True,
            )
        case "gemma3":  # another rotary base in each kind of layer
            return Gemma3TextConfig(
                **common,
                num_key_value_heads=1,
                head_dim=head_dim,
                query_pre_attn_scalar=head_dim,
                sliding_window=window,
                layer_types=mixed_layers,
                tie_word_embeddings=True,
            )
        case "phi3":
            return Phi3Config(**common, num_key_value_heads=4, sliding_window=window, tie_word_embeddings=False)
        case "phi4":  # a part of each head rotates, by factors of its own up to the original context
            rotated = 3 * head_dim // 8  # pairs of the 3/4 of a head
            rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
            rope |= {"short_factor": [1.0 + 0.1 * i for i in range(rotated)], "long_factor": [8.0] * rotated}
            longer = {**common, "max_position_embeddings": 8 * size.context}
            return Phi3Config(
                **longer,
                original_max_position_embeddings=2 * size.context,
                num_key_value_heads=2,
                rope_parameters=rope,
                tie_word_embeddings=True,
            )
        case "phi":  # its head has a bias
            return PhiConfig(**common, num_key_value_heads=4, tie_word_embeddings=False)
        case "granite":  # divides its logits
            return GraniteConfig(**common, num_key_value_heads=2, logits_scaling=3.0, tie_word_embeddings=True)
        case "cohere":  # multiplies its logits
            return CohereConfig(**common, num_key_value_heads=2, logit_scale=0.25, tie_word_embeddings=True)
        case "gpt_oss":  # attention with sinks
            return GptOssConfig(
                **common,
                num_key_value_heads=2,
                head_dim=head_dim,
                num_local_experts=2,
                num_experts_per_tok=1,
                sliding_window=window,
                layer_types=mixed_layers,
                tie_word_embeddings=False,
            )
    raise ValueError(name)


def write_family(name: str, directory: Path, size: Size = TINY) -> Path:
    """Write the small model of a family in Hugging Face format; biases and norms are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name, size), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def plain_model(directory: Path) -> PreTrainedModel:
    """Load the model as transformers alone runs it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def plain_token_logps(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    """Compute token log-probs [rows], every completion after its prompt in a forward pass of its own."""
    parts = []
    for group in groups:
        for completion in group.completion_ids:
            ids = torch.tensor(np.concatenate([group.prompt_ids, completion]), dtype=torch.int64)[None]
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            parts.append(logps.gather(1, ids[0, 1:, None])[len(group.prompt_ids) - 1 :, 0])
    return torch.cat(parts)


def make_group(seed: int, prompt: int, completions: list[int], scores: list[float] | None = None) -> Group:
    """Make a group with random ids of the given lengths."""
    rng = np.random.default_rng(seed)
    return Group(
        group_id=seed.to_bytes(16, "little"),
        prompt_ids=rng.integers(3, VOCABULARY, prompt, dtype=np.int32),
        completion_ids=tuple(rng.integers(3, VOCABULARY, n, dtype=np.int32) for n in completions),
        scores=np.array(scores or list(range(len(completions), 0, -1)), np.float32),
    )


def trying_groups() -> list[Group]:
    """Return groups of K = 1 to 5 with ragged lengths, one-token prompts and completions, and common beginnings."""
    common = make_group(3, 7, [9, 6, 6])
    first, second, third = (c.copy() for c in common.completion_ids)
    second[:4] = first[:4]
    third[:] = second  # the very same completion twice
    return [
        make_group(1, 9, [5, 8]),
        make_group(2, 3, [1]),
        Group(common.group_id, common.prompt_ids, (first, second, third), common.scores),
        make_group(4, 1, [1, 12, 2, 1]),
        make_group(5, 12, [1, 3]),
        make_group(6, 4, [3, 1, 7, 2, 5]),
    ]
