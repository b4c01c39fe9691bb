"""The sizes of a causal language model: dimensions and numbers of parameters, from its configuration alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_ray.config.model import ModelConfig, local_directory
from dpo_ray.errors import ConfigError
from dpo_ray.models.builtin import builtin_model


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a decoder in transformers, which has an embedding, identical blocks, a norm and a head."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of the feed-forward part, or of one expert in a mixture of experts
    vocabulary: int
    tied: bool = False  # the head uses the weights of the embedding
    attention_bias: int = 0  # 1 if queries, keys and values have biases, else 0
    head_norms: bool = False  # norms of each head's queries and keys (Qwen3, Gemma 3)
    norms: int = 2  # per block
    gemma_norms: bool = False  # norms that compute (1 + weight) in float32
    experts: int = 0
    experts_per_token: int = 0

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Return the shapes [in, out] of a block's linear layers by name, without the layers of experts."""
        layers = {
            "q_proj": (self.hidden, self.query_width),
            "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width),
            "o_proj": (self.query_width, self.hidden),
        }
        return layers if self.experts else layers | self._feed_forward

    @property
    def _feed_forward(self) -> dict[str, tuple[int, int]]:
        return {
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def expert_parameters(self) -> int:
        """Count the weights of one expert; 0 if there are no experts."""
        return 3 * self.hidden * self.intermediate if self.experts else 0

    @property
    def block_matrices(self) -> int:
        """Count the weights in all matrices of a block, including all experts."""
        own = sum(a * b for a, b in self.linear_layers.values())
        return own + self.experts * (self.expert_parameters + self.hidden)  # each expert has a row of the router

    @property
    def block_vectors(self) -> int:
        """Count the weights in the norms and biases of a block."""
        biases = self.attention_bias * (self.query_width + 2 * self.kv_width)
        return self.norms * self.hidden + (2 * self.head_dim if self.head_norms else 0) + biases

    @property
    def block_parameters(self) -> int:
        return self.block_matrices + self.block_vectors

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def root_parameters(self) -> int:
        """Count the parameters outside the blocks: embedding, head and last norm."""
        return self.head_parameters * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.block_parameters + self.root_parameters

    @property
    def active_block_matrices(self) -> int:
        """Count the weights in the matrices of a block that one token uses; a token uses only some of the experts."""
        return self.block_matrices - max(0, self.experts - self.experts_per_token) * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        return self.parameters - self.layers * (self.block_matrices - self.active_block_matrices)


def _llama(name: str, hidden: int, layers: int, heads: int, kv: int, intermediate: int, vocabulary: int) -> ModelSizes:
    return ModelSizes(name, hidden, layers, heads, kv, hidden // heads, intermediate, vocabulary)


# Hub models, by parts of their names; the first entry that matches is used. The sizes are from the config.json of the
# repository in the comment.
KNOWN: tuple[tuple[tuple[str, ...], ModelSizes], ...] = (
    (("llama-3.1-tulu-3-70b", "llama-3.1-70b", "llama-3.3-70b", "meta-llama-3-70b"),  # meta-llama/Llama-3.1-70B
     _llama("Llama 3 70B", 8192, 80, 64, 8, 28672, 128256)),
    (("llama-3.1-tulu-3-405b", "llama-3.1-405b"),  # meta-llama/Llama-3.1-405B
     _llama("Llama 3.1 405B", 16384, 126, 128, 8, 53248, 128256)),
    (("llama-3.1-tulu-3-8b", "llama-3.1-8b", "meta-llama-3-8b", "llama-3-8b"),  # meta-llama/Meta-Llama-3-8B
     _llama("Llama 3 8B", 4096, 32, 32, 8, 14336, 128256)),
    (("llama-3.2-3b",),  # meta-llama/Llama-3.2-3B
     ModelSizes("Llama 3.2 3B", 3072, 28, 24, 8, 128, 8192, 128256, tied=True)),
    (("llama-3.2-1b",),  # meta-llama/Llama-3.2-1B
     ModelSizes("Llama 3.2 1B", 2048, 16, 32, 8, 64, 8192, 128256, tied=True)),
    (("mixtral-8x7b",),  # mistralai/Mixtral-8x7B-v0.1
     ModelSizes("Mixtral 8x7B", 4096, 32, 32, 8, 128, 14336, 32000, experts=8, experts_per_token=2)),
    (("openhermes-2.5-mistral-7b",),  # teknium/OpenHermes-2.5-Mistral-7B: has two more tokens
     _llama("Mistral 7B", 4096, 32, 32, 8, 14336, 32002)),
    (("mistral-7b-v0.3", "mistral-7b-instruct-v0.3"),  # mistralai/Mistral-7B-v0.3
     _llama("Mistral 7B v0.3", 4096, 32, 32, 8, 14336, 32768)),
    (("mistral-7b", "zephyr-7b"),  # mistralai/Mistral-7B-v0.1
     _llama("Mistral 7B", 4096, 32, 32, 8, 14336, 32000)),
    (("qwen2.5-0.5b",),  # Qwen/Qwen2.5-0.5B
     ModelSizes("Qwen 2.5 0.5B", 896, 24, 14, 2, 64, 4864, 151936, tied=True, attention_bias=1)),
    (("qwen2.5-1.5b",),  # Qwen/Qwen2.5-1.5B
     ModelSizes("Qwen 2.5 1.5B", 1536, 28, 12, 2, 128, 8960, 151936, tied=True, attention_bias=1)),
    (("qwen2.5-7b",),  # Qwen/Qwen2.5-7B
     ModelSizes("Qwen 2.5 7B", 3584, 28, 28, 4, 128, 18944, 152064, attention_bias=1)),
    (("qwen2.5-32b",),  # Qwen/Qwen2.5-32B
     ModelSizes("Qwen 2.5 32B", 5120, 64, 40, 8, 128, 27648, 152064, attention_bias=1)),
    (("qwen2.5-72b",),  # Qwen/Qwen2.5-72B
     ModelSizes("Qwen 2.5 72B", 8192, 80, 64, 8, 128, 29568, 152064, attention_bias=1)),
    (("qwen3-8b",),  # Qwen/Qwen3-8B
     ModelSizes("Qwen 3 8B", 4096, 36, 32, 8, 128, 12288, 151936, head_norms=True)),
    (("phi-3-mini", "phi-3.5-mini"),  # microsoft/Phi-3-mini-4k-instruct
     ModelSizes("Phi-3 mini", 3072, 32, 32, 32, 96, 8192, 32064)),
)  # fmt: skip

_GEMMAS = ("gemma", "gemma2", "gemma3_text")
_UNLIKE = (
    "phi",
    "cohere",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "mamba",
    "gpt_oss",
    "deepseek_v3",
    "qwen2_moe",
)


def model_sizes(config: ModelConfig) -> ModelSizes:
    """Find a model's sizes without loading it and without a network.

    The sizes are read from the model's config.json if this file is on this machine. Otherwise they are taken from a
    table of some models by name.

    Raises:
        ConfigError: the model is only on the hub and its name is not in the table, or its blocks differ from Llama's.
    """
    where = f"model.path={config.path}"
    from dpo_ray.models.load import config_file  # it imports torch, which takes seconds

    if (file := config_file(config)) is not None:
        from transformers import AutoConfig

        try:
            values = AutoConfig.from_pretrained(file.parent, trust_remote_code=False, local_files_only=True).to_dict()
        except (ValueError, KeyError, OSError) as error:
            what = f"transformers cannot read {file}: {str(error).splitlines()[0]}"
            raise ConfigError(what, where=where, fix="use a model that this version of transformers knows") from None
        return sizes_of_config(values, where)
    if (sizes := _sizes_by_name(config)) is not None:
        return sizes
    raise ConfigError(
        "the model is not on this machine, and its name is not among the known models",
        where=where,
        fix="download it, and set model.path to its directory; for planning, its config.json is enough",
    )


def known_sizes(config: ModelConfig) -> ModelSizes | None:
    """Find a model's sizes as `model_sizes` does, but in a moment; return None if they are not known.

    Neither torch nor transformers is imported. So a value that config.json leaves out is this module's default, and not
    that of transformers.
    """
    try:
        file = _config_file(config)
        if file is None:
            return _sizes_by_name(config)
        return sizes_of_config(json.loads(file.read_bytes()), f"model.path={config.path}")
    except (ConfigError, OSError, ValueError, KeyError):
        return None


def _config_file(config: ModelConfig) -> Path | None:
    if config.path.startswith("builtin:"):
        return builtin_model(config.path.removeprefix("builtin:")) / "config.json"
    if (file := local_directory(config.path) / "config.json").is_file():
        return file
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    return Path(cached) if isinstance(cached, str) else None


def _sizes_by_name(config: ModelConfig) -> ModelSizes | None:
    name = config.path.rsplit("/", 1)[-1].lower()
    return next((sizes for parts, sizes in KNOWN if any(part in name for part in parts)), None)


def sizes_of_config(values: dict[str, Any], where: str) -> ModelSizes:
    """Read the sizes from the values of a config.json.

    Raises:
        ConfigError: the architecture is not supported, because its blocks differ from Llama's.
    """
    values = values.get("text_config", values)
    kind = str(values.get("model_type"))
    if kind in _UNLIKE or "hidden_size" not in values or "intermediate_size" not in values:
        raise ConfigError(
            f"the planner does not support the architecture `{kind}`",
            where=where,
            fix="use Llama, Mistral, Mixtral, Qwen 2 or 3, Gemma, Phi-3, or a model with the same blocks as one of these",
        )
    gemma, heads = kind in _GEMMAS, values["num_attention_heads"]
    experts = values.get("num_local_experts") or values.get("num_experts") or 0
    return ModelSizes(
        name=kind,
        hidden=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        intermediate=(values.get("moe_intermediate_size") if experts else None) or values["intermediate_size"],
        vocabulary=values["vocab_size"],
        tied=values.get("tie_word_embeddings", gemma),
        attention_bias=int(kind == "qwen2"),
        head_norms=kind in ("qwen3", "qwen3_moe", "gemma3_text"),
        norms=4 if kind in ("gemma2", "gemma3_text") else 2,
        gemma_norms=gemma,
        experts=experts,
        experts_per_token=(values.get("num_experts_per_tok") or experts) if experts else 0,
    )
