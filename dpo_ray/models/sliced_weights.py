"""Loads a sharded model slice by slice: each rank reads only its own rows of the weights from the safetensors files.

The model is first built on the meta device, where weights need no memory. Only the buffers (rotary frequencies) have values,
initialised as in `from_pretrained`. The model is sharded without weights, and then each rank fills its shards from the files.
The weights are bit for bit those that `load_policy` loads.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from dpo_ray.errors import ConfigError

from . import adapter as lora_files
from .lora import ADAPTER_FORMAT_PREFIX, NAME, first_value, is_lora
from .nf4 import Nf4Linear
from .probe import KNOWN_EXACT
from .token_logps import TokenLogps

INDEX = "model.safetensors.index.json"


class WholeModelNeededError(Exception):
    """Raised if weights cannot be read slice by slice: each rank must then load the complete model. The message says why."""


@dataclass(frozen=True)
class SlicedWeights:
    """A model on the meta device, and the file of each of its weights."""

    model: PreTrainedModel
    files: dict[str, Path]  # by the weight's name, which is the same in model and file
    adapter: lora_files.Adapter | None  # merged into the weights when they are read


def find_slices(directory: Path, adapter_directory: Path | None) -> SlicedWeights:
    """Build the model on the meta device and find each of its weights in the files.

    Raises:
        WholeModelNeededError: the weights cannot be read slice by slice. The caller must use `load_policy` instead, which
            raises ConfigError if the model cannot be loaded at all.
        ConfigError: the adapter does not belong to this model.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise WholeModelNeededError("the weights are quantized")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
    except (ValueError, KeyError, OSError) as error:
        raise WholeModelNeededError(str(error).splitlines()[0]) from None
    if model.config.model_type not in KNOWN_EXACT:
        raise WholeModelNeededError(f"the layout for `{model.config.model_type}` must be checked with its weights")
    if get_model_conversion_mapping(model, add_legacy=False):
        raise WholeModelNeededError(f"transformers converts the weights of `{model.config.model_type}`")
    files = _files(model, directory)
    _make_buffers(model)
    adapter = None if adapter_directory is None else lora_files.read_adapter(adapter_directory)
    if adapter is not None:
        lora_files.targets(model, adapter)
    return SlicedWeights(model, files, adapter)


def _files(model: PreTrainedModel, directory: Path) -> dict[str, Path]:
    """Return the file of each weight.

    Raises:
        WholeModelNeededError: a file is missing, or a weight has another name or shape in the files than in the model.
    """
    index, names = directory / INDEX, {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied weights once, under their first name
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own.keys()
    if missing := sorted(model.state_dict().keys() - own.keys() - tied):
        raise WholeModelNeededError(f"`{missing[0]}` is a persistent buffer, not a parameter")
    files: dict[str, Path] = {}
    for path in (directory / name for name in sorted(names)):
        if not path.is_file():
            raise WholeModelNeededError(f"{path.name} is missing")
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is not a dict
                if key in own and own[key] == tuple(file.get_slice(key).get_shape()):
                    files[key] = path
                else:
                    raise WholeModelNeededError(
                        f"`{key}` in the files is not a weight of the model, or has another shape"
                    )
    if missing := sorted(own.keys() - files.keys()):
        raise WholeModelNeededError(f"`{missing[0]}` is not in the files under this name")
    return files


def _make_buffers(model: PreTrainedModel) -> None:
    """Create the buffers that are not in the files. The model's code sets their values, as in `from_pretrained`."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue] - do not initialise it
    for name, buffer in model.named_non_persistent_buffers():
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()


@torch.no_grad()
def fill_shards(policy: TokenLogps, weights: SlicedWeights, device: torch.device, dtype: torch.dtype, seed: int) -> int:
    """Allocate a sharded policy on `device`, and fill each parameter with the rows that this rank holds.

    Args:
        dtype: dtype of the forward pass; 4-bit weights are dequantized to it.
        seed: seed for the initial values of the adapter that is trained.

    Returns:
        The number of bytes of weights that this rank has read.
    """
    policy._apply(
        lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t
    )  # like to_empty, but only for meta tensors
    read = 0
    with ExitStack() as stack:
        opened = {p: stack.enter_context(safe_open(p, framework="pt")) for p in set(weights.files.values())}
        if weights.adapter is not None:
            adapter = stack.enter_context(safe_open(weights.adapter.directory / lora_files.WEIGHTS, framework="pt"))
        else:
            adapter = None
        for name, parameter in list(policy.model.named_parameters()):
            module = policy.model.get_submodule(name.rpartition(".")[0])
            name = name.replace(_CHECKPOINT_PREFIX, "")
            rows, local = _held(parameter)
            if rows.start == rows.stop:  # fewer rows than ranks
                continue
            if is_lora(name):
                local.copy_(first_value(name, tuple(parameter.shape), seed)[rows])
                continue
            key = name.replace(".base_layer.", ".")
            quantized = module if isinstance(module, Nf4Linear) and parameter is module.weight else None
            rows = rows if quantized is None else slice(0, quantized.out_features)
            part = opened[weights.files[key]].get_slice(key)[rows]
            read += part.numel() * part.element_size()
            if weights.adapter is not None and (layer := key.removesuffix(".weight")) in weights.adapter.layers:
                # The full product, then its rows: a product of single rows may be rounded differently.
                part = part.to(torch.float32).add_(lora_files.product(adapter, weights.adapter, layer)[rows])
            if quantized is None:
                local.copy_(part)
            else:
                quantized.hold(part.to(device), dtype)
    return read


@torch.no_grad()
def fill_adapter(policy: TokenLogps, directory: Path) -> None:
    """Load the values of a trained adapter in PEFT's format into the adapter of a policy, which may be sharded.

    Raises:
        ConfigError: the trained adapter changes other layers than the policy's adapter, or has another rank.
    """
    with safe_open(directory / lora_files.WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for name, parameter in policy.model.named_parameters():
            if not is_lora(name):
                continue
            key = ADAPTER_FORMAT_PREFIX + name.replace(_CHECKPOINT_PREFIX, "").replace(f".{NAME}.weight", ".weight")
            if key not in names or tuple(file.get_slice(key).get_shape()) != tuple(parameter.shape):
                raise ConfigError(
                    f"the adapter that training continues from has no {key} of shape {list(parameter.shape)}",
                    where=str(directory),
                    fix="set train.lora to the values with which the adapter was trained",
                )
            rows, local = _held(parameter)
            if rows.start < rows.stop:
                local.copy_(file.get_slice(key)[rows])


def _held(parameter: nn.Parameter) -> tuple[slice, Tensor]:
    """Return the range of rows of a parameter that this rank holds, and the tensor with these rows."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter)), parameter
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return slice(offset[0], offset[0] + shape[0]), parameter.to_local()
