"""Prepare shards without Ray: a real staging place, the builtin tokenizer, and one with a chat template."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.store import Artifact, ArtifactStore
from dpo_ray.artifacts.tables import read_table
from dpo_ray.config.data import DataConfig
from dpo_ray.config.model import ModelConfig
from dpo_ray.data.admission import Rejected
from dpo_ray.data.filters import load_filters
from dpo_ray.data.first_pass import PrepareTask, commit_shard, prepare_piece
from dpo_ray.data.groups import TextGroup, TokenGroup
from dpo_ray.data.second_pass import PreparedShard, choose, commit_tokens, merge_part
from dpo_ray.data.sources import Shard, list_shards, pieces
from dpo_ray.data.tokenizing.template_process import TemplateProcess
from dpo_ray.data.tokenizing.tokenize import tokenize_groups
from dpo_ray.models.load import model_directory
from dpo_ray.report.samples import quarantine_examples

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
template_process = functools.cache(TemplateProcess)  # one for all tests; it ends with them
ROW = {"prompt": "Say it.", "chosen": "good", "rejected": "bad"}


def tokenized_groups(
    groups: Sequence[TextGroup | Rejected], tokenizer: Any, template: str, config: DataConfig
) -> list[TokenGroup | Rejected]:
    return tokenize_groups(groups, tokenizer, template, config, template_process())


@pytest.fixture(scope="session")
def builtin_dir() -> str:
    return str(model_directory(ModelConfig(path="builtin:sentiment_llama")))


@pytest.fixture(scope="session")
def chatml_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a tokenizer of single bytes with ChatML's special tokens."""
    directory = tmp_path_factory.mktemp("chatml")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    specials = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    inner.add_special_tokens([AddedToken(t, special=True) for t in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    return str(directory)


@dataclass
class Prepared:
    """What came of preparing: the artifact and its tables as rows."""

    artifact: Artifact
    parts: dict[str, bytes]

    @property
    def rows(self) -> dict[str, int]:
        return self.artifact.manifest.rows

    def groups(self, split: str = "train") -> list[dict[str, Any]]:
        return [r for n in self.artifact.names(f"{split}/") for r in read_table(self.artifact, n).to_pylist()]

    def quarantined(self) -> list[dict[str, Any]]:
        return [r for rows in quarantine_examples(self.artifact, 10**9).values() for r in rows]

    def reasons(self) -> list[str]:
        return sorted(r["reason"] for r in self.quarantined())


@pytest.fixture
def prepare(tmp_path: Path, builtin_dir: str) -> Callable[..., Prepared]:
    """Return a function that prepares sources as the stage does, and checks that every row is accounted for."""
    store = ArtifactStore(Storage(tmp_path / "artifacts"))
    provenance = Provenance(1, {}, {}, {})

    def artifact_of(shard: Shard, task: PrepareTask) -> Artifact:
        staging = store.begin("shard", f"k{len(list(tmp_path.glob('artifacts/*-*')))}", "test")
        parts = [(piece.index, part) for piece in pieces(shard) for part in prepare_piece(piece, staging, task)]
        return commit_shard(staging, parts, provenance)

    def run(train: Any, *, tokenizer_dir: str = builtin_dir, template: str = "plain", **config: Any) -> Prepared:
        data = DataConfig.model_validate({"train": train, **config})
        sets = {"train": data.train, **data.eval_sets}
        task = PrepareTask(tokenizer_dir, template, data, load_filters(data.rules.filters))
        shards = [
            PreparedShard(shard, artifact_of(shard, task))
            for split, sources in sets.items()
            for shard in list_shards(split, sources)
        ]
        staging = store.begin("prepare", f"k{len(list(tmp_path.glob('artifacts/*-*')))}", "test")
        parts = [merge_part(choice, staging) for choice in choose(shards, data)]
        artifact = commit_tokens(shards, parts, staging, provenance)
        prepared = Prepared(artifact, {n: artifact.read_bytes(n) for n in artifact.names()})
        artifact.verify()
        for split in sets:
            rows = {k.removeprefix(f"{split}/"): v for k, v in prepared.rows.items() if k.startswith(f"{split}/")}
            assert rows["rows_in"] == rows["admitted"] + rows["quarantined"] + rows["duplicates"]
            assert rows["admitted"] == len(prepared.groups(split))
            assert rows["quarantined"] == sum(q["split"] == split for q in prepared.quarantined())
        accounts = artifact.manifest.figures["accounts"]
        assert sum(a["rows_in"] for a in accounts) == sum(s.artifact.manifest.rows["rows_in"] for s in shards)
        for row in prepared.quarantined():
            assert len(row["sample"]) <= 200
            assert row["sample"].isprintable()
            assert row["detail"].isprintable()
        return prepared

    return run


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes rows (or lines of bytes, unchanged) and returns the file's path."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> str:
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write


def only_shard(path: str, **source: Any) -> Shard:
    """Name the one shard that a path is."""
    (shard,) = list_shards("train", DataConfig.model_validate({"train": {"path": path, **source}}).train)
    return shard
