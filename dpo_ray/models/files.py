"""Checks a model's files without loading the weights, so that `dpo-ray validate` finds faults before anything starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dpo_ray.errors import ConfigError

from .architecture import check_attention, check_media_parts

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_LENGTH_BYTES = 8  # a file begins with the length of its header, a number of 8 bytes
INDEX = "model.safetensors.index.json"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def read_config(directory: Path, where: str) -> dict[str, Any]:
    """Read a model's config.json.

    Raises:
        ConfigError: the file is missing or not a JSON object, or the model contains its own code.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"the file is not a JSON object, but a JSON value of the type {type(config).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(
            f"config.json cannot be read: {what}", where=where, fix="name a directory in Hugging Face format"
        ) from None
    if "auto_map" in config:
        raise ConfigError(
            "the model contains its own code (auto_map), which is never run",
            where=where,
            fix="use a model that transformers supports",
        )
    return config


def check_architecture(directory: Path, where: str) -> None:
    """Check, without loading the weights, that a causal language model of this architecture can be trained and exported.

    Raises:
        ConfigError: transformers has no such model, or its log-probs or exported weights would be wrong.
    """
    config = _architecture(directory, where)
    check_attention(config, where)
    names = (name for file in _weight_files(directory, where) for name in _header(file, where))
    check_media_parts(config, names, where)


def check_weights(directory: Path, tokens: Mapping[str, int], where: str) -> int:
    """Check that transformers knows the model, its weight files are complete, and the tokenizer fits.

    A weight file is complete if its header is sound and fits the size of the file. The tokenizer fits if the embedding has a
    row for each token of the tokenizer.

    Args:
        tokens: the ids of all tokens of the tokenizer.

    Returns:
        The number of parameters in the files.

    Raises:
        ConfigError: one of these checks fails.
    """
    config = _architecture(directory, where)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    rows, count = {}, 0
    for file in _weight_files(directory, where):
        for name, tensor in _header(file, where).items():
            count += math.prod(tensor["shape"])
            if name.endswith(EMBEDDINGS) and len(tensor["shape"]) == 2:
                rows[name] = tensor["shape"][0]
    if type(vocabulary) is not int:
        return count
    for name, own in rows.items():
        if own != vocabulary:
            raise ConfigError(
                f"`{name}` has {own} rows, but config.json gives a vocabulary of {vocabulary}",
                where=where,
                fix="name a model whose config.json and *.safetensors belong together",
            )
    beyond = min(((i, token) for token, i in tokens.items() if i >= vocabulary), default=None)
    if beyond is not None:
        raise ConfigError(
            f"the tokenizer's token {beyond[1]!r} has the id {beyond[0]}, but the embedding has {vocabulary} rows",
            where=where,
            fix="use the model's own tokenizer, or resize its embedding (resize_token_embeddings) and save it again",
        )
    return count


def _architecture(directory: Path, where: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each architecture has its own code for reading it, which may raise anything
        raise ConfigError(
            f"transformers cannot read config.json: {next(iter(str(error).splitlines()), type(error).__name__)}",
            where=where,
            fix="use a model that this version of transformers supports",
        ) from None


def _weight_files(directory: Path, where: str) -> list[Path]:
    """List the files that hold the weights: the files that the index names or, without an index, all *.safetensors.

    Raises:
        ConfigError: the index cannot be read, or a file that the index names is missing.
    """
    if not (directory / INDEX).is_file():
        return sorted(directory.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads((directory / INDEX).read_bytes())["weight_map"].values()))
        files = [directory / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{INDEX} cannot be read: {type(error).__name__}: {error}", where=where, fix="download the model again"
        ) from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{INDEX} names {missing[0]}, which is missing" + (f", and {len(missing) - 1} more" * (len(missing) > 1)),
            where=where,
            fix="download the model again",
        )
    return files


def _header(file: Path, where: str) -> dict[str, Any]:
    """Read the header of a safetensors file. Check that the file ends where the last tensor ends.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    size_bytes = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length_bytes = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if length_bytes > min(MAX_HEADER_BYTES, size_bytes - _LENGTH_BYTES):
                raise ValueError("the file is shorter than its header says")
            header = json.loads(stream.read(length_bytes))
        header.pop("__metadata__", None)
        if not all(type(n) is int and n >= 0 for tensor in header.values() for n in tensor["shape"]):
            raise ValueError("a tensor has no valid shape")
        end = _LENGTH_BYTES + length_bytes + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if end != size_bytes:
            raise ValueError(f"the tensors end at byte {end:,}, but the file ends at byte {size_bytes:,}")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file.name} is damaged or incomplete: {error or type(error).__name__}",
            where=where,
            fix="download or save the model again",
        ) from None
    return header
