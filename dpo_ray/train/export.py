"""The finished policy in Hugging Face format: safetensors, tokenizer, chat template, generation config, model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

from dpo_ray.config.train import LoraConfig
from dpo_ray.models.load import TOKENIZER_FILES
from dpo_ray.models.lora import add_product, is_lora, matrices_of, write_adapter
from dpo_ray.models.token_logps import TokenLogps

from .dtensor import gathered


def gather_policy(policy: TokenLogps, dtype: torch.dtype, lora: LoraConfig | None = None) -> dict[str, Tensor]:
    """Gather what is exported on rank 0's CPU, one weight at a time; collective. Other ranks get an empty dict.

    Of an adapter that is not to be merged its matrices alone, in float32. All else in `dtype`, in which it is served: float32
    masters are rounded once, an adapter that is merged is added before.
    """
    held = {  # this rank's shards
        name.removeprefix("model."): w for name, w in get_model_state_dict(policy).items() if isinstance(w, Tensor)
    }
    alone = lora is not None and not lora.merge
    tied = policy.model.all_tied_weights_keys or {}
    keeps = not dist.is_initialized() or dist.get_rank() == 0
    whole: dict[str, Tensor] = {}
    for name, weight in held.items():
        if is_lora(name) != alone or name in tied:
            continue
        if (pair := matrices_of(name, held.keys())) is not None and lora is not None:
            a, b = (gathered(held[matrix]) for matrix in pair)
            one = add_product(gathered(weight), a, b, lora).to(dtype)
        else:
            one = gathered(weight.to(dtype) if weight.is_floating_point() and not alone else weight)
        if keeps:
            whole[name.replace(".base_layer.", ".")] = one.cpu()
    return whole


def write_policy(
    policy: TokenLogps,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    source: Path,
    template: str,
    target: Path,
    lora: LoraConfig | None = None,
    base: str = "",
) -> None:
    """Write the model directory, or the adapter's where one was trained and is not to be merged.

    Args:
        weights: as `gather_policy` gathers them on rank 0.
        template: the chat template's text that training used, `plain`, or `auto`.
        base: what an adapter names as its model.
    """
    model = policy.model
    if lora is not None and not lora.merge:
        write_adapter(weights, lora, base, target)
        _write_tokenizer(source, template, target)
        return
    if lora is not None:
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
