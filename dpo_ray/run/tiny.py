"""Miniature recipes (`--tiny`): the same stages with a tiny random model and synthetic data, in about a minute.

A miniature shows whether a recipe's objective, optimizer, schedule, adapters, sharding, layout and data types work
together, before GPUs are requested. It needs no network. What the tiny model learns has no meaning.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

from dpo_ray.artifacts.digest import digest
from dpo_ray.artifacts.disk import make_dirs
from dpo_ray.config.load import validate_recipe
from dpo_ray.config.model import ModelConfig, is_hub_name
from dpo_ray.config.online import OnlineConfig
from dpo_ray.config.recipe import Recipe
from dpo_ray.data.tokenizing.chat import load_tokenizer
from dpo_ray.errors import ConfigError
from dpo_ray.models.builtin import builtin_model
from dpo_ray.models.load import config_file, model_directory

VERSION = 1  # increased when the tiny model of a family changes
STEPS, GROUPS_PER_STEP, EVAL_PAIRS = 3, 8, 16
MAX_LENGTH_TOKENS, CONTEXT_TOKENS, TOKENS_PER_MICRO_BATCH = 192, 256, 1024
AUDIT_GROUPS, SAMPLE_PROMPTS, NEW_TOKENS = 8, 4, 16
ROUNDS, SAMPLES_PER_PROMPT = 2, 4

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
"""The `model_type` of each family. vLLM and the trainer compute the attention of these families in the same way."""

FAMILY_OF_NAME = (  # the first part that occurs in the name counts, so base models come before names of fine-tuned ones
    ("zephyr", "mistral"),
    ("mistral", "mistral"),
    ("llama", "llama"),
    ("qwen3", "qwen3"),
    ("qwen", "qwen2"),
    ("gemma-3", "gemma3_text"),
    ("gemma-2-", "gemma2"),
    ("gemma", "gemma"),
    ("phi-3", "phi3"),
    ("phi-4", "phi3"),
    ("tulu", "llama"),
    ("hermes", "llama"),
    ("smollm", "llama"),
)

TEMPLATE = (  # Zephyr's: turns that end with EOS
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)


def tiny_recipe(recipe: Recipe) -> Recipe:
    """Shrink a recipe: a new name, a tiny model of the same family, synthetic data, few steps, and only this machine.

    The objective, shaping, optimizer, adapters, sharding mode, layout, data types, chat template and limits of the audit
    stay the same. The tiny model is built in $XDG_CACHE_HOME/dpo_ray/tiny if it is not there yet.

    Raises:
        ConfigError: the family of the recipe's model is not supported, or the model's directory is not valid.
    """
    family, template = _family(recipe.model), _template(recipe.model)
    values = recipe.model_dump(mode="json")
    values["name"] = f"{recipe.name[:59]}-tiny"
    values["model"] = {"path": str(tiny_model(family, template)), "dtype": recipe.model.dtype}
    values["data"] |= _data(recipe)
    values["reference"] |= _reference(recipe)
    values["train"] |= _train(recipe)
    values["evaluate"] |= {
        "sample_prompts": min(recipe.evaluate.sample_prompts, SAMPLE_PROMPTS),
        "max_new_tokens": min(recipe.evaluate.max_new_tokens, NEW_TOKENS),
    }
    if recipe.online is not None:
        values["online"] |= _online(recipe.online)
    values["ray"] = {"address": "local"}
    values["cluster"]["roles"] = {}
    return validate_recipe(values, where=f"{recipe.name}, made tiny")


def _data(recipe: Recipe) -> dict[str, Any]:
    """Return the section `data` with synthetic pairs for each source. Weights, and names of held-out sets, are kept."""
    data, pairs = recipe.data, STEPS * min(recipe.train.groups_per_step, GROUPS_PER_STEP)
    sets = {name: _synthetic(sources, EVAL_PAIRS) for name, sources in data.eval_sets.items()}
    named = isinstance(data.eval, dict)
    return {
        "train": _synthetic(data.train, pairs),
        "eval": {name.removeprefix("eval_"): rows for name, rows in sets.items()} if named else sets.get("eval", []),
        "max_length_tokens": min(data.max_length_tokens, MAX_LENGTH_TOKENS),
        "max_prompt_tokens": data.max_prompt_tokens and min(data.max_prompt_tokens, MAX_LENGTH_TOKENS),
    }


def _synthetic(sources: Sequence[Any], pairs: int) -> list[dict[str, Any]]:
    return [
        {"type": "synthetic", "pairs": pairs, "seed": seed, "name": source.name, "weight": source.weight}
        for seed, source in enumerate(sources)
    ]


def _reference(recipe: Recipe) -> dict[str, Any]:
    audit = recipe.reference.audit
    return {
        "replicas": 1,
        "max_replicas": None,
        "tensor_parallel": 1,
        "max_batched_tokens": None,
        "store": None,  # scores of random models are of no use to other runs
        "audit": audit.model_dump(mode="json") | {"groups": min(audit.groups, AUDIT_GROUPS)},
    }


def _train(recipe: Recipe) -> dict[str, Any]:
    t = recipe.train
    workers, shard_workers = _workers(recipe)
    return {
        "workers": workers,
        "min_workers": None,
        "steps": min(t.steps or STEPS, STEPS),
        "groups_per_step": min(t.groups_per_step, GROUPS_PER_STEP),
        "tokens_per_micro_batch": min(t.tokens_per_micro_batch, TOKENS_PER_MICRO_BATCH),
        "eval_every_steps": t.eval_every_steps and min(t.eval_every_steps, STEPS - 1),
        "checkpoint_every_steps": t.checkpoint_every_steps and min(t.checkpoint_every_steps, STEPS - 1),
        "sharding": t.sharding.model_dump(mode="json") | {"shard_workers": shard_workers},
    }


def _online(online: OnlineConfig) -> dict[str, Any]:
    """Return the section `online` with few, small rounds, and a judge that needs no endpoint or reward model.

    The judge uses the true reward of the synthetic data.
    """
    sampling = online.sampling.model_dump(mode="json")
    samples = min(online.sampling.samples_per_prompt, SAMPLES_PER_PROMPT)
    return {
        "rounds": min(online.rounds, ROUNDS),
        "prompts": None,
        "prompts_per_round": min(online.prompts_per_round, GROUPS_PER_STEP),
        "sampling": sampling | {"samples_per_prompt": samples, "max_new_tokens": NEW_TOKENS, "pair_truncated": True},
        "judge": {"type": "function", "function": "dpo_ray.data.synthetic.length_rewards"},
        "pairing": online.pairing.model_dump(mode="json") | {"min_margin": 0.0, "min_agreement": 0.0, "min_pairs": 1},
        "evaluate": {"prompts": SAMPLE_PROMPTS},
        "promote_if": {},
        "stop_if": {},
    }


def _workers(recipe: Recipe) -> tuple[int, int | None]:
    """Return the number of workers, and how many of them share a copy of the weights in hybrid sharding.

    Hybrid sharding uses 4 workers in sets of 2 if this machine has 4 GPUs or, without GPUs, 4 CPUs.
    """
    gpus, cpus = torch.cuda.device_count(), os.cpu_count() or 1
    room = gpus or max(2, cpus)  # CPUs can be shared, GPUs not
    if recipe.train.sharding.mode == "hybrid" and recipe.train.workers >= 4 and room >= 4:
        return 4, 2
    return min(recipe.train.workers, 2, room), 1 if recipe.train.sharding.mode == "hybrid" else None


def _family(config: ModelConfig) -> str:
    """Return the family of a model: from its config.json if it is on this machine, otherwise from the model's name."""
    if (file := config_file(config)) is not None:
        model_type = str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))
        family = {"gemma3": "gemma3_text"}.get(model_type, model_type)
        reason = f"model_type is {model_type} in {file}"
    else:
        name = config.path.rsplit("/", 1)[-1].lower()
        family = next((family for part, family in FAMILY_OF_NAME if part in name), None)
        reason = "it is not on this machine, and its name shows no family"
    if family not in FAMILIES:
        raise ConfigError(
            f"--tiny has no model of this kind: {reason}",
            where=f"model.path={config.path}",
            fix=f"the families are {', '.join(FAMILIES)}: set model.path to a model of one, such as model.path=tiny/llama",
        )
    return family


def _template(config: ModelConfig) -> str:
    """Return the chat template of a model on this machine.

    If the model has none or is not on this machine, return a template that works with any tokenizer.
    """
    own = None if is_hub_name(config.path) else load_tokenizer(str(model_directory(config))).chat_template
    template = own.get("default") if isinstance(own, dict) else own
    return template or TEMPLATE


def tiny_model(family: str, template: str) -> Path:
    """Return the directory of a family's tiny random model, which is built once, in the user's cache.

    The weights are the same every time it is built.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_ray" / "tiny"
    place = cache / f"{family}-{digest([VERSION, family, template])[:12]}"
    if place.is_dir():
        return place
    make_dirs(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as scratch:
        unfinished = Path(scratch) / "model"
        _write_model(family, template, unfinished)
        try:
            unfinished.rename(place)
        except OSError:  # another command has built the same model in the meantime
            if not place.is_dir():
                raise
    return place


def _write_model(family: str, template: str, directory: Path) -> None:
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(builtin_model("sentiment_llama"), local_files_only=True)
    tokenizer.chat_template = template
    config = family_config(
        family, len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(VERSION)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def family_config(family: str, vocabulary: int, pad: int, bos: int, eos: int) -> PreTrainedConfig:
    """Return the configuration of a family's tiny model: two layers of width 128, with heads of width 32.

    32 is the smallest width of a head that vLLM supports on every device.
    """
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_TOKENS,
        "initializer_range": 0.05,  # tokens differ enough that a wrong log-prob shows in the audit
        "pad_token_id": pad,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    windows = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    match family:
        case "llama":
            return LlamaConfig(**common, num_key_value_heads=2)
        case "mistral":
            return MistralConfig(**common, num_key_value_heads=2)
        case "qwen2":
            return Qwen2Config(**common, num_key_value_heads=2, tie_word_embeddings=True)
        case "qwen3":
            return Qwen3Config(**common, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
        case "gemma":
            return GemmaConfig(**common, num_key_value_heads=1, head_dim=32)
        case "gemma2":
            return Gemma2Config(**common, **windows, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32)
        case "gemma3_text":
            return Gemma3TextConfig(**common, **windows, num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32)
        case "phi3":
            return Phi3Config(**common, num_key_value_heads=2)
    raise ValueError(family)
