"""Passwords and signatures in URLs stand nowhere in what a run writes for people."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.config.load import validate_recipe
from dpo_ray.data.readers.locations import shown
from dpo_ray.run.context import recipe_yaml

SECRETS = ("CANARY", "SIGNATURE")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("https://user:CANARY@host:8443/a/b.jsonl?X-Amz-Signature=SIGNATURE", "https://host:8443/a/b.jsonl"),
        ("http://CANARY@host/a.jsonl", "http://host/a.jsonl"),
        ("s3://key:CANARY@bucket/rows-*.jsonl", "s3://bucket/rows-*.jsonl"),
        ("az://container/a.jsonl?sv=1&sig=SIGNATURE", "az://container/a.jsonl"),
        ("s3://bucket/rows-?.jsonl", "s3://bucket/rows-?.jsonl"),
        ("hf://datasets/org/name@main/a.parquet", "hf://datasets/org/name@main/a.parquet"),
        ("data/a@b?.jsonl", "data/a@b?.jsonl"),
        ("https://host", "https://host"),
    ],
)
def test_a_location_is_shown_without_them(location: str, expected: str) -> None:
    assert shown(location) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"data": {"train": "https://user:CANARY@host/a.jsonl?sig=SIGNATURE"}},
        {
            "data": {
                "train": [
                    "a.jsonl",
                    {"type": "files", "path": ["https://u:CANARY@host/a.jsonl?SIGNATURE"], "name": "x"},
                ]
            }
        },
        {"data": {"train": "a.jsonl", "eval": {"held": "s3://key:CANARY@bucket/a.jsonl"}}},
        {"output": "s3://key:CANARY@bucket/runs"},
        {"reference": {"store": "gs://key:CANARY@bucket/store"}},
    ],
)
def test_the_recipe_that_is_written_has_none(values: dict[str, Any]) -> None:
    base = {"name": "x", "model": {"path": "builtin:sentiment_llama"}, "data": {"train": "a.jsonl"}}
    text = recipe_yaml(validate_recipe(base | values))
    assert not [secret for secret in SECRETS if secret in text]
    assert "name: x" in text


def test_a_judges_address_has_none() -> None:
    judge = {"type": "llm", "base_url": "https://user:CANARY@host/v1?key=SIGNATURE", "model": "m"}
    values = {
        "name": "x",
        "model": {"path": "builtin:sentiment_llama"},
        "data": {"train": "a.jsonl", "eval": "b.jsonl"},
        "online": {"judge": judge, "prompts_per_round": 4},
    }
    text = recipe_yaml(validate_recipe(values))
    assert "https://host/v1" in text
    assert not [secret for secret in SECRETS if secret in text]
