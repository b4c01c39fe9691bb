"""Adds trainable LoRA adapters to a model with PEFT, and exports them separately or merged into the weights.

Only the parameters of the adapter are trained. Before step 1 the product B A is zero, so that policy and reference are the same
model.
Source: https://huggingface.co/docs/peft/developer_guides/low_level_api (inject_adapter_in_model).
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_ray.config.train import LoraConfig
from dpo_ray.errors import ConfigError

from .adapter import WEIGHTS

if TYPE_CHECKING:  # PEFT takes seconds to import, and most runs train no adapter
    import peft

NAME = "default"
ADAPTER_FORMAT_PREFIX = "base_model.model."


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Add a trainable float32 adapter to the linear layers that `config` names, and freeze all other parameters.

    If the model is on the meta device, so is the adapter. `first_value` later computes the adapter's values.

    Raises:
        ConfigError: no layer has a name that `config` lists; or `config` lists the head or an embedding, which cannot
            have an adapter.
    """
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(
            _peft_config(config), model, adapter_name=NAME, low_cpu_mem_usage=model.device.type == "meta"
        )
    except ValueError as error:
        raise ConfigError(
            f"no adapter can be added: {str(error).splitlines()[0]}",
            where=f"train.lora.target_modules={config.target_modules}",
            fix="name linear layers of the model, such as q_proj, or use all-linear",
        ) from None
    head = model.get_output_embeddings()
    if head is not None and any(is_lora(f".{name}") for name, _ in head.named_parameters()):
        raise ConfigError(
            "the head (the output embedding) cannot have an adapter",
            where=f"train.lora.target_modules={config.target_modules}",
            fix="remove its name from the list, or use all-linear, which excludes it",
        )
    if any(".lora_embedding_" in name for name, _ in model.named_parameters()):
        raise ConfigError(
            "an embedding cannot have an adapter",
            where=f"train.lora.target_modules={config.target_modules}",
            fix="name linear layers of the model, such as q_proj, or use all-linear",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_lora(name))
        if is_lora(name) and parameter.device.type != "meta":
            with torch.no_grad():
                parameter.copy_(first_value(name, tuple(parameter.shape), seed))


def check_targets(config: LoraConfig, directory: Path) -> int:
    """Check that the model in a directory has layers for the adapter, and count the adapter's parameters.

    The model is built without weights.

    Raises:
        ConfigError: for the same reasons as in `add_lora`.
    """
    settings = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    add_lora(model, config, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def first_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the initial value of the adapter matrix `name`. It is the same on every rank.

    B is zero. A [rank, in] is random, with a seed made from `seed` and `name`: uniform within +-1/sqrt(in), as in PEFT
    (Kaiming with a = sqrt(5)).
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    own = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(own))


def _peft_config(config: LoraConfig) -> peft.LoraConfig:
    from peft import LoraConfig as PeftConfig

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    return PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - a float works as well
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def is_lora(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def matrices_of(name: str, names: Container[str]) -> tuple[str, str] | None:
    """Return the names of the matrices A and B that adapt the weight `name`, or None if no adapter changes it."""
    layer = name.removesuffix(".base_layer.weight")
    a, b = (f"{layer}.lora_{side}.{NAME}.weight" for side in "AB")
    return (a, b) if layer != name and a in names else None


def add_product(weight: Tensor, a: Tensor, b: Tensor, config: LoraConfig) -> Tensor:
    """Return weight + alpha / rank * b @ a, all float32: weight [out, in], a [rank, in], b [out, rank]."""
    return weight + config.alpha / config.rank * (b @ a)


def write_adapter(weights: dict[str, Tensor], config: LoraConfig, base: str, target: Path) -> None:
    """Write the adapter without its base model, in PEFT's format. `base` is the name of the base model."""
    from safetensors.torch import save_file

    own = {
        ADAPTER_FORMAT_PREFIX + name.replace(f".{NAME}.weight", ".weight"): weight.contiguous()
        for name, weight in weights.items()
    }
    save_file(own, target / WEIGHTS, metadata={"format": "pt"})
    described = _peft_config(config)
    described.base_model_name_or_path = base
    described.inference_mode = True
    if described.target_modules == "all-linear":  # readers of the file need the names of the layers instead
        resolved = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in own}
        described.target_modules = resolved  # pyright: ignore[reportAttributeAccessIssue] - PEFT converts it to a set
    described.save_pretrained(str(target))
