"""Finds, identifies and loads a model in Hugging Face format. Code in the model's directory is never run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_ray.artifacts.digest import digest
from dpo_ray.artifacts.digest_cache import cached_file_sha256
from dpo_ray.config.model import ModelConfig, is_hub_name, local_directory
from dpo_ray.errors import ConfigError, InfrastructureError

from . import adapter as lora
from .builtin import builtin_model
from .files import read_config
from .packed_rows import Layout
from .probe import check_segments
from .token_logps import TokenLogps

BUILTIN = "builtin:"
OTHER_FORMATS = ["consolidated*"]  # Mistral's format, a second copy of the same weights
LONGROPE = ("longrope", "su")  # "su" is its old name
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
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"


def model_directory(config: ModelConfig) -> Path:
    """Return the local directory of a model. A model of the hub is downloaded first, unless it is in the hub's cache.

    Raises:
        ConfigError: the model does not exist, has no safetensors, or contains its own code.
        InfrastructureError: the hub cannot be reached.
    """
    if config.path.startswith(BUILTIN):
        return builtin_model(config.path.removeprefix(BUILTIN))
    if is_hub_name(config.path):
        return _download(config)
    directory = local_directory(config.path)
    _check(directory, f"model.path={config.path}")
    return directory


def _check(directory: Path, where: str) -> None:
    if not os.path.isdir(directory):
        raise ConfigError(
            "there is no such model directory",
            where=where,
            fix="name a directory in Hugging Face format, a model of the hub (ORGANISATION/NAME), or builtin:NAME",
        )
    if (directory / lora.CONFIG).is_file():  # with PEFT installed, transformers would silently add it
        raise ConfigError(
            f"the model directory contains an adapter ({lora.CONFIG})",
            where=where,
            fix="name its base model in model.path, and the adapter's directory in model.adapter",
        )
    read_config(directory, where)
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            "the model directory has no *.safetensors",
            where=where,
            fix="convert the weights to safetensors; pickled weights are not read",
        )


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*WEIGHT_PATTERNS, *TOKENIZER_FILES, NAMED_TEMPLATES, "generation_config.json"]
    where = f"model.path={config.path}"
    try:
        directory = Path(
            snapshot_download(
                config.path, revision=config.revision, allow_patterns=patterns, ignore_patterns=OTHER_FORMATS
            )
        )
    except LocalEntryNotFoundError:
        raise InfrastructureError(
            "the model is not in the hub's cache, and the hub cannot be reached",
            where=where,
            fix="check the network, or download the model and name its directory",
        ) from None
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise ConfigError(
            f"the hub refuses the download: {str(error).splitlines()[0]}",
            where=where,
            fix="check name, revision and HF_TOKEN",
        ) from None
    _check(directory, where)
    return directory


def config_file(config: ModelConfig) -> Path | None:
    """Find the model's config.json on this machine, without its weights; return None if a hub model is not in the cache.

    Raises:
        ConfigError: a model that is not from the hub does not exist.
    """
    if os.path.isfile(file := local_directory(config.path) / "config.json"):
        return file
    if not is_hub_name(config.path):
        return model_directory(config) / "config.json"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    return Path(cached) if isinstance(cached, str) else None


def model_identity(config: ModelConfig) -> str:
    """Return a digest of a model's configuration, weights and adapter; for a model of the hub, of its name and revision."""
    base, adapter = _base_identity(config), lora.adapter_directory(config)
    return base if adapter is None else digest([base, lora.read_adapter(adapter).identity()])


def _base_identity(config: ModelConfig) -> str:
    if is_hub_name(config.path):
        return digest(["hub", config.path, config.revision or "main"])
    directory = model_directory(config)
    files = sorted(f for pattern in WEIGHT_PATTERNS for f in directory.glob(pattern))
    return digest({f.name: cached_file_sha256(f) for f in files})


def tokenizer_identity(config: ModelConfig) -> str:
    """Return a digest of the tokenizer's files; for a tokenizer of the hub, of its name and revision."""
    if is_hub_name(config.path):
        return digest(["hub tokenizer", config.path, config.revision or "main"])
    directory = model_directory(config)
    return digest({name: cached_file_sha256(directory / name) for name in tokenizer_files(directory)})


def tokenizer_files(directory: Path) -> list[str]:
    """List the paths of the tokenizer's files within a model directory: the usual files, then additional chat templates."""
    named = (file.relative_to(directory).as_posix() for file in directory.glob(NAMED_TEMPLATES) if file.is_file())
    return [*(name for name in TOKENIZER_FILES if (directory / name).is_file()), *sorted(named)]


def context_tokens(directory: Path) -> int | None:
    """Return the model's context length, or None if its configuration does not state one.

    For a model with longrope (Phi), return the original context length minus one token. If the context is longer than the
    original length, such a model rotates all positions differently. The rotation of a sequence would then depend on other
    sequences: in training on the longest sequence of the forward pass, in vLLM on the context length of the engine, which is
    one token more than the longest sequence.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) in LONGROPE:
        original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings", 4096)
        return original - 1
    return text.get("max_position_embeddings")


def attention_heads(directory: Path) -> int | None:
    """Return the number of the model's attention heads, or None if its configuration does not state one."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    heads = config.get("text_config", config).get("num_attention_heads")
    return heads if type(heads) is int else None


def load_policy(
    directory: Path, dtype: torch.dtype, chunk_tokens: int, adapter: Path | None = None, layout: Layout = "shared"
) -> TokenLogps:
    """Load a causal language model as a policy that computes token log-probs. Dropout is disabled.

    `layout` is the arrangement of sequences in a forward pass. If the model's log-probs are not exact with this layout, a
    simpler layout is used (`check_segments`). A LoRA adapter is added to the weights in float32, before they are rounded to
    `dtype`.

    Raises:
        ConfigError: transformers does not support the architecture; the files do not hold exactly the weights of the
            architecture; the model computes wrong log-probs in every layout; or the adapter does not fit this model.
    """
    model = _load(directory, dtype if adapter is None else torch.float32)
    if adapter is not None:
        lora.merge(model, lora.read_adapter(adapter))
        for parameter in model.parameters():  # not buffers: rotary frequencies keep the type in which they are loaded
            parameter.data = parameter.data.to(dtype)
    return as_policy(model, chunk_tokens, layout, f"model.path={directory}")


def as_policy(model: PreTrainedModel, chunk_tokens: int, layout: Layout, where: str) -> TokenLogps:
    """Make a policy, which computes token log-probs, from a loaded model. Dropout is disabled.

    Raises:
        ConfigError: the model computes wrong log-probs in every layout (`check_segments`).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # preference losses compare two forward passes, which must use the same network
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
            attn_implementation="eager",  # every model supports it; `check_segments` later sets what the layout needs
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are rejected below, by name
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ConfigError(
            f"transformers cannot load the model: {next(iter(str(error).splitlines()), type(error).__name__)}",
            where=where,
            fix="use a causal language model that this version of transformers supports",
        ) from None
    model, report = loaded
    # Missing weights would be drawn at random, differently in every process.
    for kind, problem in (
        ("missing_keys", "the files do not contain the weight"),
        ("unexpected_keys", "the model has no weight"),
        ("mismatched_keys", "config.json sets another shape for the weight"),
    ):
        if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[kind]):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(
                f"{problem} `{names[0]}`{more}",
                where=where,
                fix="name a causal language model whose config.json and *.safetensors belong together",
            )
    return model
