"""Reads a LoRA adapter in PEFT's format, checks that it fits the model, and merges it into the model's weights."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_ray.artifacts.digest import digest
from dpo_ray.artifacts.digest_cache import cached_file_sha256
from dpo_ray.config.model import ModelConfig, is_hub_name, local_directory
from dpo_ray.errors import ConfigError

Shape = tuple[int, int]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields that are read here, and fields that do not change the meaning of the saved weights.
_READ = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
)
_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # for layers with a transposed weight; all targets here are plain linear layers
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",  # the names of the weights determine which modules are adapted
        "task_type",
    }
)
# These only initialise the two matrices; the others (pissa, olora, corda, loftq) change the base weights too.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
MERGE_IT = "merge it into its base with PEFT (merge_and_unload) and set model.path to the result"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


@dataclass(frozen=True)
class AdaptedLayer:
    """One linear layer that the adapter changes: the layer's weight W becomes W + scaling * B A."""

    in_features: int
    out_features: int
    rank: int
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter's files."""

    directory: Path
    where: str  # for errors
    layers: dict[str, AdaptedLayer]  # by the module's name in the model

    def identity(self) -> str:
        """Return a digest of the adapter: of the bytes of its weights, and of the scaling of each layer.

        All other fields of the configuration are left out. They either have no effect on the result (dropout, the name of the
        base model, the order of the targets, PEFT's version), or adapters that use them are refused. So two adapters that
        compute the same function have the same digest, and share log-probs in the reference store.
        """
        scaling = {name: layer.scaling for name, layer in self.layers.items()}
        return digest({"weights": cached_file_sha256(self.directory / WEIGHTS), "scaling": scaling})


def adapter_directory(config: ModelConfig) -> Path | None:
    """Return the absolute path of the adapter's directory, or None if the recipe sets no adapter.

    Raises:
        ConfigError: the directory does not exist.
    """
    if config.adapter is None:
        return None
    directory = local_directory(config.adapter)
    if not os.path.isdir(directory):
        is_on_hub = is_hub_name(config.adapter)
        raise ConfigError(
            "there is no such directory" + (", and adapters are not fetched from the hub" if is_on_hub else ""),
            where=f"model.adapter={config.adapter}",
            fix=f"run `hf download {config.adapter} --local-dir DIRECTORY`, and name that directory"
            if is_on_hub
            else f"name a directory with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes them",
        )
    return directory


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter's configuration and the shapes of its weights. Only JSON and safetensors files are read.

    Source: https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint

    Raises:
        ConfigError: a file is missing, or the adapter is not LoRA of linear layers.
    """
    where = f"model.adapter={directory}"
    config = _read_config(directory / CONFIG, where)
    _check_config(config, where)
    shapes = _read_shapes(directory / WEIGHTS, where)
    return Adapter(directory, where, {m: _layer(config, m, a, b, where) for m, (a, b) in sorted(shapes.items())})


def check_targets(adapter: Adapter, model_directory: Path) -> None:
    """Check that the model has each layer that the adapter changes, with the same shape. No weights are loaded.

    Raises:
        ConfigError: a layer is missing or has another shape.
    """
    try:
        config = AutoConfig.from_pretrained(model_directory, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError):
        return  # loading the model raises the error later
    targets(model, adapter)


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add the adapter to the weights of a float32 model, in place. The result is an ordinary model.

    Raises:
        ConfigError: an adapted layer is not in the model, or has another shape.
    """
    with safe_open(adapter.directory / WEIGHTS, framework="pt") as file:
        for name, linear in targets(model, adapter).items():
            linear.weight.add_(product(file, adapter, name))


def product(file: Any, adapter: Adapter, name: str) -> torch.Tensor:
    """Compute the matrix that the adapter adds to one layer's weight: float32 [out, in]. `file` is the open adapter file."""
    a, b = (file.get_tensor(f"base_model.model.{name}.lora_{m}.weight").to(torch.float32) for m in "AB")
    return (b @ a) * adapter.layers[name].scaling  # [out, rank] @ [rank, in]


def targets(model: PreTrainedModel, adapter: Adapter) -> dict[str, nn.Linear]:
    """Return the layers of the model that the adapter changes, by their names.

    Raises:
        ConfigError: a layer is not in the model, has another shape, or cannot have an adapter here (head, embedding, not
            linear).
    """
    modules = dict(model.named_modules())
    base, merged = "name its base model in model.path", "train the adapter without that layer, or " + MERGE_IT
    layers: dict[str, nn.Linear] = {}
    for name, layer in adapter.layers.items():
        linear = modules.get(name)
        if linear is None:
            problem, fix = f"the model has no module `{name}`", base
        elif linear is model.get_output_embeddings() or linear is model.get_input_embeddings():
            problem, fix = (
                f"the adapter changes `{name}`, but the head and the embeddings cannot have an adapter",
                merged,
            )
        elif not isinstance(linear, nn.Linear):
            problem, fix = f"the adapter changes `{name}`, which is not a linear layer", merged
        elif (linear.in_features, linear.out_features) != (layer.in_features, layer.out_features):
            is_, has = (f"{x.in_features} -> {x.out_features}" for x in (layer, linear))
            problem, fix = f"the adapter changes `{name}` with {is_} features, but the model's layer has {has}", base
        else:
            layers[name] = linear
            continue
        raise ConfigError(problem, where=adapter.where, fix=fix)
    return layers


def _layer(config: dict[str, Any], name: str, a: Shape, b: Shape, where: str) -> AdaptedLayer:
    """Build the description of one adapted layer from the shapes `a` and `b` of its matrices A [rank, in] and B [out, rank]."""
    rank = _of_module(config, "rank_pattern", name, "r", where)
    alpha = _of_module(config, "alpha_pattern", name, "lora_alpha", where)
    if a[0] != rank or b[1] != rank:
        raise ConfigError(
            f"the weights of `{name}` have rank {a[0]} (A) and {b[1]} (B), but {CONFIG} sets rank {rank:g}",
            where=where,
            fix="save the adapter again: its two files do not match",
        )
    return AdaptedLayer(a[1], b[0], a[0], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _read_config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{CONFIG} cannot be read: {error}", where=where, fix="name a directory that PEFT's save_pretrained wrote"
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(f"{CONFIG} is not a JSON object", where=where, fix="save the adapter again with PEFT")
    return config


def _check_config(config: dict[str, Any], where: str) -> None:
    """Check that an adapter is plain LoRA. Without this check, any other adapter would be merged wrongly.

    Raises:
        ConfigError: the adapter is of another type, or uses more than plain LoRA.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(
            f"the adapter is of type {kind}, but only LORA is supported",
            where=where,
            fix=MERGE_IT,
        )
    used = [name for name, value in config.items() if value and name not in _READ | _INERT]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        used.append("init_lora_weights")
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        shown = ", ".join(f"{name}={config[name]!r}"[:80] for name in sorted(used))
        raise ConfigError(
            f"the adapter is more than LoRA of linear layers: {shown}",
            where=where,
            fix=MERGE_IT,
        )


def _read_shapes(path: Path, where: str) -> dict[str, tuple[Shape, Shape]]:
    """Read the shapes of the matrices A [rank, in] and B [out, rank] of each module, from the header of the weights' file."""
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        raise ConfigError(
            f"the directory has no {WEIGHTS}" + (", and pickled weights are not read" if pickled else ""),
            where=where,
            fix="save the adapter with PEFT's save_pretrained(safe_serialization=True)",
        )
    matrices: dict[str, dict[str, Shape]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is not a dict
                named, shape = _NAME.fullmatch(key), tuple(file.get_slice(key).get_shape())
                if named is None or len(shape) != 2:
                    raise ConfigError(
                        f"the weight `{key}` is not part of LoRA of a linear layer (embeddings, modules_to_save and others "
                        "are not supported)",
                        where=where,
                        fix=MERGE_IT,
                    )
                matrices.setdefault(named["module"], {})[named["matrix"]] = shape
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{WEIGHTS} cannot be read: {error}", where=where, fix="copy this file again") from None
    halves = [module for module, pair in matrices.items() if len(pair) != 2]
    if halves or not matrices:
        raise ConfigError(
            f"one of the two matrices of `{halves[0]}` is missing" if halves else f"{WEIGHTS} holds no weights",
            where=where,
            fix="save the adapter again with PEFT",
        )
    return {module: (pair["A"], pair["B"]) for module, pair in matrices.items()}


def _of_module(config: dict[str, Any], pattern: str, module: str, default: str, where: str) -> float:
    """Return the rank or alpha of a module from the configuration.

    PEFT's rank_pattern or alpha_pattern (the field `pattern`) maps regular expressions to values. The first expression
    that matches the end of the module's name decides. If no expression matches, the value of the field `default` is
    returned.
    """
    try:
        matching = (k for k in config.get(pattern) or {} if re.fullmatch(rf"(.*\.)?({k})", module))
        key = next(matching, None)
    except re.error as error:
        raise ConfigError(
            f"{CONFIG}: {pattern} has an invalid pattern: {error}", where=where, fix="correct the pattern"
        ) from None
    value = config.get(default) if key is None else config[pattern][key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        field = default if key is None else f"{pattern}.{key}"
        raise ConfigError(f"{CONFIG}: {field} is {value!r}, not a number over 0", where=where, fix=f"correct {CONFIG}")
    return value
