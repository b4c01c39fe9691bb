"""The recipe section `model`: the model that is trained. Before training, this model is also the reference model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from .base import StrictModel

HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)

DType = Literal["auto", "float32", "bfloat16"]


class ModelConfig(StrictModel):
    """The model to train. Before step 1 it is both the policy, which is then trained, and the reference, which is frozen."""

    path: str = Field(min_length=1)
    """A directory in Hugging Face format (config.json, *.safetensors, tokenizer); the name of a model on the Hugging
    Face hub; or `builtin:NAME` for a model of this package."""

    revision: str | None = None
    """Only for models of the hub: a branch, a tag or, preferably, a commit of 40 hex digits."""

    adapter: str | None = Field(default=None, min_length=1)
    """A directory with a LoRA adapter in PEFT's format. If it is set, policy and reference are at first the model with
    this adapter merged into its weights."""

    dtype: DType = "auto"
    """Data type in which policy and reference model compute. auto: bfloat16 on a GPU, float32 on a CPU. The weights that
    the optimizer updates are always float32."""


def local_directory(path: str) -> Path:
    """Return the absolute path of a recipe's `path`, which need not exist.

    Unlike methods of Path, `os.path` raises no error for a user without a home or a name that is too long.
    """
    return Path(os.path.abspath(os.path.expanduser(path))).resolve()


def is_hub_name(path: str) -> bool:
    """Return whether `path` is a model's name on the Hugging Face hub (`organisation/name`), not a file or directory."""
    return HUB_NAME.fullmatch(path) is not None and not os.path.exists(path)
