"""Export of the trained policy in Hugging Face format: weights, tokenizer, chat template and generation config."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

from dpo_ray.config.train import LoraConfig
from dpo_ray.data.tokenizing.chat import AUTO, PLAIN, is_unresolved, load_tokenizer, resolved
from dpo_ray.models.load import NAMED_TEMPLATES, tokenizer_files
from dpo_ray.models.lora import add_product, is_lora, matrices_of, write_adapter
from dpo_ray.models.token_logps import TokenLogps

from .dtensor import gathered

TEMPLATE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # as a file name, it cannot point outside of its directory


def gather_policy(policy: TokenLogps, dtype: torch.dtype, lora: LoraConfig | None = None) -> dict[str, Tensor]:
    """Gather the weights to export on rank 0's CPU, one tensor at a time. Other ranks return an empty dict.

    If the trained adapter is not merged into the model, only the adapter's matrices are exported, in float32. Otherwise
    all weights are exported in `dtype`. They are rounded from float32 only once, after the adapter (if any) has been
    added. Collective: all ranks must call this.
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
            full = add_product(gathered(weight), a, b, lora).to(dtype)
        else:
            full = gathered(weight.to(dtype) if weight.is_floating_point() and not alone else weight)
        if keeps:
            whole[name.replace(".base_layer.", ".")] = full.cpu()
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
    """Write the model directory, or the adapter's directory if an adapter was trained and is not merged.

    Args:
        weights: the result of `gather_policy` on rank 0.
        template: the text of the chat template that training used, or `plain`, `auto`, or `name:NAME`.
        base: the base model that the adapter's configuration names.
    """
    model = policy.model
    if lora is not None and not lora.merge:
        write_adapter(weights, lora, base, target)
        _write_tokenizer(source, template, target)
        return
    if lora is not None:
        with torch.device("meta"):  # a model without the adapter's modules: only its parameter names are needed
            model = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    model.save_pretrained(target, state_dict=weights, max_shard_size="5GB")
    model.config.dtype = dtype  # save_pretrained writes the dtype of the module's parameters, not of `weights`
    model.config.save_pretrained(target)
    _write_tokenizer(source, template, target)


def _write_tokenizer(source: Path, template: str, target: Path) -> None:
    for name in [*tokenizer_files(source), "generation_config.json"]:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    if template not in (PLAIN, AUTO):  # auto: the tokenizer's own template, which is in its files
        if is_unresolved(template):
            template = resolved(template, load_tokenizer(str(source)))
        _write_named_templates(target)
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_named_templates(target: Path) -> None:
    """Write each named template of tokenizer_config.json to a file of its own.

    This is needed because the policy also gets a file chat_template.jinja, the default template. If that file exists,
    loaders ignore the templates in tokenizer_config.json.
    """
    try:
        templates = json.loads((target / "tokenizer_config.json").read_bytes()).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return
    for each in templates if isinstance(templates, list) else []:
        name, text = (each.get("name"), each.get("template")) if isinstance(each, dict) else (None, None)
        if isinstance(name, str) and isinstance(text, str) and name != "default" and TEMPLATE_NAME.fullmatch(name):
            file = target / Path(NAMED_TEMPLATES).parent / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
