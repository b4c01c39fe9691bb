"""The keys of prepared data: hashes of everything that the artifact of a shard, or the tokens artifact, depends on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from dpo_ray.artifacts.digest import artifact_key, digest
from dpo_ray.config.data import DataConfig
from dpo_ray.config.extension import FORMATS, installed_names, packages_of

from .filters import Filter
from .near_duplicates import MINHASH_VERSION
from .sources import Shard, shard_digest
from .tokenizing.chat import PLAIN, is_unresolved

SHARD_VERSION = 3
"""Increase this number if a change of the code leads to other groups from the same shard.

All shard artifacts, and all artifacts that are built from them, then become stale."""


def shard_configs(
    shards: Sequence[Shard], data: DataConfig, tokenizer: str, template: str, filters: Sequence[Filter]
) -> list[dict[str, Any]]:
    """Return, for each shard (input file), all values that its groups depend on.

    These are a digest of the shard's content, and the settings with which it is read and tokenized.

    The shard's location, split and source are not included, so that the artifact can be reused if they change.
    """
    common = {
        "tokenizer": tokenizer,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "chat_template": template if template == PLAIN or is_unresolved(template) else digest(template),
        **data.model_dump(
            mode="json",
            include={
                "chat_template_kwargs",
                "chat_template_date",
                "max_length_tokens",
                "max_prompt_tokens",
                "truncation",
                "pairing",
                "rows_per_part",
            },
        ),
        "special_tokens": data.rules.special_tokens,
        "minhash": MINHASH_VERSION if data.rules.near_duplicates is not None else None,
        "filters": [f.digest for f in filters],
    }
    # Only present if they are not the default, so that the keys of other recipes do not change.
    common |= {
        name: rule
        for name in ("dropped_content", "control_characters")
        if (rule := getattr(data.rules, name)) != "quarantine"
    }
    if packages := packages_of(FORMATS, installed_names(FORMATS)):  # `auto` may recognise any of their formats
        common["packages"] = packages
    return [
        {
            "digest": shard_digest(s),
            "format": s.row_format,
            "columns": s.columns.model_dump(mode="json"),
            "criteria": dict(s.criteria),
            **common,
        }
        for s in shards
    ]


def shard_key(config: dict[str, Any]) -> str:
    """Return the key of a shard's artifact; `config` is the shard's entry of `shard_configs`."""
    return artifact_key("shard", SHARD_VERSION, config, {})


def prepare_config(
    shards: Sequence[Shard], configs: Sequence[dict[str, Any]], data: DataConfig, *, with_mismatched: bool = False
) -> dict[str, Any]:
    """Return all values that the tokens artifact (the output of `prepare`) depends on.

    These are its shards (input files) in their order, and the rules over all rows.
    """
    own = ("digest", "format", "columns", "criteria")
    sources = [
        {"split": s.split, "source": s.source, **{k: c[k] for k in own}} for s, c in zip(shards, configs, strict=True)
    ]
    common = {k: v for k, v in configs[0].items() if k not in own} if configs else {}
    mixture = {
        split: [{"weight": s.weight, "max_groups": s.max_groups, "name": s.name} for s in split_sources]
        for split, split_sources in {"train": data.train, **data.eval_sets}.items()
    }
    rules = data.rules.model_dump(mode="json", include={"conflicts", "leakage", "near_duplicates"})
    config = {"sources": sources, **common, "mixture": mixture, "rules": rules, "shard_version": SHARD_VERSION}
    # Only present if it is needed, so that the keys of other objectives do not change.
    return {**config, "mismatched": True} if with_mismatched else config
