"""The finished policy in Hugging Face format: safetensors, tokenizer, chat template, generation config, model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM

from dpo_ray.config.train import LoraConfig
from dpo_ray.models.load import TOKENIZER_FILES
from dpo_ray.models.lora import merged, write_adapter
from dpo_ray.models.token_logps import TokenLogps


def gather_policy(policy: TokenLogps, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gather all weights on rank 0's CPU (collective; other ranks get an empty dict), in the type they are served in."""
    whole = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    tensors = {name.removeprefix("model."): w for name, w in whole.items() if isinstance(w, torch.Tensor)}
    return {name: w.to(dtype) if w.is_floating_point() else w for name, w in tensors.items()}


def write_policy(
    policy: TokenLogps,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    source: Path,
    template: str,
    target: Path,
    lora: LoraConfig | None = None,
    base: str = "",
) -> None:
    """Write the model directory, or the adapter's where one was trained and is not to be merged.

    Args:
        template: the chat template's text that training used, `plain`, or `auto`.
        base: what an adapter names as its model.
    """
    model = policy.model
    if lora is not None and not lora.merge:
        write_adapter(weights, lora, base, target)
        _write_tokenizer(source, template, target)
        return
    if lora is not None:
        weights = merged(weights, lora)
        with torch.device("meta"):  # a model without the adapter's modules, for its names alone
            model = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    model.save_pretrained(target, state_dict=weights, max_shard_size="5GB")
    model.config.dtype = dtype  # save_pretrained writes the type of the module's parameters, not that of `weights`
    model.config.save_pretrained(target)
    _write_tokenizer(source, template, target)


def _write_tokenizer(source: Path, template: str, target: Path) -> None:
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if template not in ("plain", "auto"):  # auto: the tokenizer's own, which its files hold
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
