"""Find, identify and load a model in Hugging Face format, never running code from its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_ray.artifacts.digest import digest
from dpo_ray.artifacts.digest_cache import cached_file_sha256
from dpo_ray.config.model import ModelConfig
from dpo_ray.errors import ConfigError, InfrastructureError

from . import adapter as lora
from .builtin import builtin_model
from .packed_rows import Layout
from .probe import check_segments
from .token_logps import TokenLogps

BUILTIN = "builtin:"
OTHER_FORMATS = ["consolidated*"]  # Mistral's: the same weights once more
LONGROPE = ("longrope", "su")  # and its old name
WEIGHT_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)


def is_hub_name(path: str) -> bool:
    """Say whether `path` is meant as `organisation/name` on the hub rather than as a directory."""
    return (
        not Path(path).exists() and path.count("/") == 1 and not path.startswith((".", "/", "~")) and "\\" not in path
    )


def model_directory(config: ModelConfig) -> Path:
    """Return the local directory of a model; a hub name is downloaded (or found in the hub's cache).

    Raises:
        ConfigError: no such model, no safetensors, or it wants to run code of its own.
        InfrastructureError: the hub cannot be reached.
    """
    if config.path.startswith(BUILTIN):
        return builtin_model(config.path.removeprefix(BUILTIN))
    if is_hub_name(config.path):
        return _download(config)
    directory = Path(config.path).expanduser().resolve()
    _check(directory, f"model.path={config.path}")
    return directory


def _check(directory: Path, where: str) -> None:
    if not directory.is_dir():
        raise ConfigError(
            "no such model directory",
            where=where,
            fix="name a directory in Hugging Face format, ORGANISATION/NAME, or builtin:NAME",
        )
    if (directory / lora.CONFIG).is_file():  # with PEFT installed, transformers would add it without a word
        raise ConfigError(
            f"there is an adapter in it ({lora.CONFIG})",
            where=where,
            fix="name its base in model.path, and a directory with the adapter in model.adapter",
        )
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.json cannot be read: {error}", where=where, fix="the directory must be in Hugging Face format"
        ) from None
    if "auto_map" in config:
        raise ConfigError(
            "the model brings code of its own (auto_map), which is never run",
            where=where,
            fix="use a model that transformers knows",
        )
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            "no *.safetensors in it",
            where=where,
            fix="convert the weights to safetensors; pickled weights are not read",
        )


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*WEIGHT_PATTERNS, *TOKENIZER_FILES, "generation_config.json"]
    where = f"model.path={config.path}"
    try:
        directory = Path(
            snapshot_download(
                config.path, revision=config.revision, allow_patterns=patterns, ignore_patterns=OTHER_FORMATS
            )
        )
    except LocalEntryNotFoundError:
        raise InfrastructureError(
            "not in the hub's cache, and the hub cannot be reached",
            where=where,
            fix="check the network, or download it and give its directory",
        ) from None
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise ConfigError(
            f"the hub refuses it: {str(error).splitlines()[0]}", where=where, fix="check name, revision and HF_TOKEN"
        ) from None
    _check(directory, where)
    return directory


def model_identity(config: ModelConfig) -> str:
    """Identify a model by its bytes: configuration and weights, and those of its adapter.

    A hub model that is not here is identified by name and revision.
    """
    base, adapter = _base_identity(config), lora.adapter_directory(config)
    return base if adapter is None else digest([base, lora.read_adapter(adapter).identity()])


def _base_identity(config: ModelConfig) -> str:
    if is_hub_name(config.path):
        return digest(["hub", config.path, config.revision or "main"])
    directory = model_directory(config)
    files = sorted(f for pattern in WEIGHT_PATTERNS for f in directory.glob(pattern))
    return digest({f.name: cached_file_sha256(f) for f in files})


def tokenizer_identity(config: ModelConfig) -> str:
    """Identify a tokenizer by its files' bytes."""
    if is_hub_name(config.path):
        return digest(["hub tokenizer", config.path, config.revision or "main"])
    directory = model_directory(config)
    return digest({n: cached_file_sha256(directory / n) for n in TOKENIZER_FILES if (directory / n).is_file()})


def context_tokens(directory: Path) -> int | None:
    """Return the model's context length, where its configuration states one.

    Of a model with longrope (Phi) it is the context before that: beyond, all positions turn otherwise, and of which kind
    a sequence is would depend on others, on the longest beside it in a forward pass and on the context that vLLM was
    started with, which is one token longer than the longest sequence.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) in LONGROPE:
        original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings", 4096)
        return original - 1
    return text.get("max_position_embeddings")


def load_policy(
    directory: Path, dtype: torch.dtype, chunk_tokens: int, adapter: Path | None = None, layout: Layout = "shared"
) -> TokenLogps:
    """Load a causal language model ready to give token log-probs, in `layout` or the next that it computes exactly; no dropout.

    A LoRA adapter is added to the weights in float32, before they are rounded to `dtype`.

    Raises:
        ConfigError: transformers does not know the architecture, the files do not hold exactly its weights, no layout serves
            it, or the adapter is none of this model's.
    """
    model = _load(directory, dtype if adapter is None else torch.float32)
    if adapter is not None:
        lora.merge(model, lora.read_adapter(adapter))
        for parameter in model.parameters():  # and no buffer: rotary frequencies stay as they are loaded
            parameter.data = parameter.data.to(dtype)
    return as_policy(model, chunk_tokens, layout, f"model.path={directory}")


def as_policy(model: PreTrainedModel, chunk_tokens: int, layout: Layout, where: str) -> TokenLogps:
    """Have a model give token log-probs, without dropout.

    Raises:
        ConfigError: no layout serves its architecture.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # preference losses compare two forward passes: both must see the same network
    policy = TokenLogps(model, chunk_tokens, layout)
    check_segments(policy, where)
    return policy


def _load(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    where = f"model.path={directory}"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="eager",  # every model has it; `check_segments` sets that of the layout
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(
            f"transformers cannot load it: {str(error).splitlines()[0]}",
            where=where,
            fix="use a causal language model that this version of transformers knows",
        ) from None
    model, found = loaded
    # Weights that are missing would be drawn at random, by every process anew.
    for kind, problem in (
        ("missing_keys", "the files lack"),
        ("unexpected_keys", "the model has no place for"),
        ("mismatched_keys", "config.json gives another shape to"),
    ):
        if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in found[kind]):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(
                f"{problem} `{names[0]}`{more}",
                where=where,
                fix="name a causal language model whose config.json and *.safetensors belong together",
            )
    return model
