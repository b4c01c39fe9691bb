"""A LoRA adapter in PEFT's format: read from its two files, checked against the model, merged into the model's weights."""

from __future__ import annotations

import json
import math
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
from dpo_ray.config.model import ModelConfig
from dpo_ray.errors import ConfigError

Shape = tuple[int, int]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields that are read here, and fields that change nothing about what the saved weights mean.
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
        "fan_in_fan_out",  # of a layer that keeps its weight transposed; every target here is a plain linear layer
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
        "target_modules",  # the weights' names say which modules are adapted
        "task_type",
    }
)
# These only say how the two matrices began; the others (pissa, olora, corda, loftq) changed the base's weights too.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
MERGE_IT = "merge it into its base with PEFT (merge_and_unload) and give the result as model.path"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


@dataclass(frozen=True)
class AdaptedLayer:
    """One linear layer of the model, for whose weight W the adapter puts W + scaling * B A."""

    in_features: int
    out_features: int
    rank: int
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """What an adapter's files say."""

    directory: Path
    where: str  # for errors
    layers: dict[str, AdaptedLayer]  # by the module's name in the model

    def identity(self) -> str:
        """Identify it by what it computes: the weights' bytes and each layer's scaling.

        Every other field of the configuration either has no effect on the weights (dropout, the base's name, the order of
        the targets, PEFT's version) or is refused, so that adapters which compute the same share their log-probs.
        """
        scaling = {name: layer.scaling for name, layer in self.layers.items()}
        return digest({"weights": cached_file_sha256(self.directory / WEIGHTS), "scaling": scaling})


def adapter_directory(config: ModelConfig) -> Path | None:
    """Return the absolute directory of the model's adapter, None where it has none.

    Raises:
        ConfigError: there is no such directory.
    """
    if config.adapter is None:
        return None
    directory = Path(config.adapter).expanduser().resolve()
    if not directory.is_dir():
        is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.adapter) is not None
        raise ConfigError(
            "no such directory" + (", and adapters are not fetched from the hub" if is_hub_name else ""),
            where=f"model.adapter={config.adapter}",
            fix=f"`hf download {config.adapter} --local-dir DIRECTORY`, and name that directory"
            if is_hub_name
            else f"name a directory with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes them",
        )
    return directory


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter's configuration and the shapes of its weights. Only JSON and safetensors are ever read.

    Source: https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint

    Raises:
        ConfigError: it is not there, or something other than LoRA of linear layers.
    """
    where = f"model.adapter={directory}"
    config = _read_config(directory / CONFIG, where)
    _check_config(config, where)
    shapes = _read_shapes(directory / WEIGHTS, where)
    return Adapter(directory, where, {m: _layer(config, m, a, b, where) for m, (a, b) in sorted(shapes.items())})


def check_targets(adapter: Adapter, model_directory: Path) -> None:
    """See that every adapted layer is in the model, with that shape; reads the model's configuration, not its weights.

    Raises:
        ConfigError: one is not.
    """
    try:
        config = AutoConfig.from_pretrained(model_directory, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError):
        return  # loading the model says what is wrong with it
    targets(model, adapter)


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add the adapter to a float32 model's weights, in place: a model like any other, for training and for export.

    Raises:
        ConfigError: a layer that it adapts is not in the model, or has another shape.
    """
    with safe_open(adapter.directory / WEIGHTS, framework="pt") as file:
        for name, linear in targets(model, adapter).items():
            linear.weight.add_(product(file, adapter, name))


def product(file: Any, adapter: Adapter, name: str) -> torch.Tensor:
    """Compute what is added to one layer's weight, from the adapter's opened file: float32 [out, in]."""
    a, b = (file.get_tensor(f"base_model.model.{name}.lora_{m}.weight").to(torch.float32) for m in "AB")
    return (b @ a) * adapter.layers[name].scaling  # [out, rank] @ [rank, in]


def targets(model: PreTrainedModel, adapter: Adapter) -> dict[str, nn.Linear]:
    """Find each adapted layer in the model.

    Raises:
        ConfigError: one is not in the model, has another shape, or is of a kind that is not supported.
    """
    modules = dict(model.named_modules())
    base, merged = "name the model it was trained on in model.path", "train it without it, or " + MERGE_IT
    found: dict[str, nn.Linear] = {}
    for name, layer in adapter.layers.items():
        linear = modules.get(name)
        if linear is None:
            problem, fix = f"the model has no module `{name}`", base
        elif linear is model.get_output_embeddings() or linear is model.get_input_embeddings():
            problem, fix = f"it adapts `{name}`, and adapters of the head or the embeddings are not supported", merged
        elif not isinstance(linear, nn.Linear):
            problem, fix = f"it adapts `{name}`, which is no linear layer", merged
        elif (linear.in_features, linear.out_features) != (layer.in_features, layer.out_features):
            is_, has = (f"{x.in_features} -> {x.out_features}" for x in (layer, linear))
            problem, fix = f"it takes `{name}` for {is_} features, and the model's is {has}", base
        else:
            found[name] = linear
            continue
        raise ConfigError(problem, where=adapter.where, fix=fix)
    return found


def _layer(config: dict[str, Any], name: str, a: Shape, b: Shape, where: str) -> AdaptedLayer:
    """Describe one layer from the shapes of its A [rank, in] and B [out, rank]."""
    rank = _of_module(config, "rank_pattern", name, "r", where)
    alpha = _of_module(config, "alpha_pattern", name, "lora_alpha", where)
    if a[0] != rank or b[1] != rank:
        raise ConfigError(
            f"the weights of `{name}` have rank {a[0]} (A) and {b[1]} (B), and {CONFIG} says {rank:g}",
            where=where,
            fix="save the adapter again: its two files do not belong together",
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
        raise ConfigError(f"{CONFIG} is not a mapping", where=where, fix="save the adapter again with PEFT")
    return config


def _check_config(config: dict[str, Any], where: str) -> None:
    """Refuse what is not plain LoRA: taken for it, it would give another model without any error."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(
            f"it is an adapter of type {kind}, and only LORA is supported",
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
            f"it is more than LoRA of linear layers: {shown}",
            where=where,
            fix=MERGE_IT,
        )


def _read_shapes(path: Path, where: str) -> dict[str, tuple[Shape, Shape]]:
    """Read the shapes of A [rank, in] and B [out, rank] by module from the file's header."""
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        raise ConfigError(
            f"no {WEIGHTS} in it" + (", and pickled weights are not read" if pickled else ""),
            where=where,
            fix="save the adapter with PEFT's save_pretrained(safe_serialization=True)",
        )
    matrices: dict[str, dict[str, Shape]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dict
                named, shape = _NAME.fullmatch(key), tuple(file.get_slice(key).get_shape())
                if named is None or len(shape) != 2:
                    raise ConfigError(
                        f"the weight `{key}` is none of LoRA of a linear layer (embeddings, modules_to_save and others "
                        "are not supported)",
                        where=where,
                        fix=MERGE_IT,
                    )
                matrices.setdefault(named["module"], {})[named["matrix"]] = shape
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{WEIGHTS} cannot be read: {error}", where=where, fix="copy it again") from None
    halves = [module for module, pair in matrices.items() if len(pair) != 2]
    if halves or not matrices:
        raise ConfigError(
            f"one of the two matrices of `{halves[0]}` is missing" if halves else f"{WEIGHTS} holds no weights",
            where=where,
            fix="save the adapter again with PEFT",
        )
    return {module: (pair["A"], pair["B"]) for module, pair in matrices.items()}


def _of_module(config: dict[str, Any], pattern: str, module: str, default: str, where: str) -> float:
    """Look up a module in PEFT's rank_pattern or alpha_pattern: the first key that matches the end of its name."""
    try:
        matching = (k for k in config.get(pattern) or {} if re.fullmatch(rf"(.*\.)?({k})", module))
        key = next(matching, None)
    except re.error as error:
        raise ConfigError(f"{CONFIG}, {pattern}: {error}", where=where, fix="mend the pattern") from None
    value = config.get(default) if key is None else config[pattern][key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        field = default if key is None else f"{pattern}.{key}"
        raise ConfigError(f"{CONFIG}: {field} is {value!r}, no number over 0", where=where, fix=f"mend {CONFIG}")
    return value
