"""Tiny random models of several families, their plain Hugging Face forward, and groups that try the packed layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from dpo_ray.schedule.micro_batch import Group

VOCABULARY = 61
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    # Large weights: scores and logits that differ much, so that a wrong mask, window or softcap shows.
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def family_config(name: str) -> PreTrainedConfig:
    """Configure the tiny model of a family; windows are shorter than the sequences, so they are felt."""
    match name:
        case "llama":
            return LlamaConfig(**_SIZE, num_key_value_heads=2, tie_word_embeddings=False)
        case "qwen3":
            return Qwen3Config(**_SIZE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False)
        case "mistral":
            return MistralConfig(**_SIZE, num_key_value_heads=2, sliding_window=5, tie_word_embeddings=False)
        case "gemma2":
            return Gemma2Config(
                **_SIZE,
                num_key_value_heads=2,
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention"],
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                tie_word_embeddings=True,
            )
        case "phi3":
            return Phi3Config(**_SIZE, num_key_value_heads=4, sliding_window=None, tie_word_embeddings=False)
        case "phi":  # its head has a bias
            return PhiConfig(**_SIZE, num_key_value_heads=4, tie_word_embeddings=False)
        case "granite":  # divides its logits
            return GraniteConfig(**_SIZE, num_key_value_heads=2, logits_scaling=3.0, tie_word_embeddings=True)
        case "cohere":  # multiplies its logits
            return CohereConfig(**_SIZE, num_key_value_heads=2, logit_scale=0.25, tie_word_embeddings=True)
        case "gpt_oss":  # attention with sinks
            return GptOssConfig(
                **_SIZE,
                num_key_value_heads=2,
                head_dim=8,
                num_local_experts=2,
                num_experts_per_tok=1,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention"],
                tie_word_embeddings=False,
            )
    raise ValueError(name)


def write_family(name: str, directory: Path) -> Path:
    """Write the tiny model of a family in Hugging Face format; biases and norms are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name), dtype=torch.float32)
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
    """Give groups of K = 1 to 4 with ragged lengths, one-token prompts and completions, and common beginnings."""
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
    ]
