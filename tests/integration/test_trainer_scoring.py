"""Scoring on the training workers: FSDP2 over real Ray Train, the step-0 loss that follows, an adapter, and a killed worker."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.train import TrainConfig
from dpo_ray.models.builtin import builtin_model
from dpo_ray.observe.progress import Reporter
from dpo_ray.reference.granule import GRANULE, Scored
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.store.store import Numerics, ReferenceStore
from dpo_ray.reference.trainer_pool import score_with_trainer
from dpo_ray.run.offline import offline
from tests.helpers.role_resources import WORKER
from tests.integration.conftest import small_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]
MODEL = builtin_model("sentiment_llama")
SETTINGS = ScorerSettings("trainer", str(MODEL), "float32", "cpu", 256, None, 0.9, share_prompt=True)


def make_granules(count: int, groups: int) -> list[pa.Table]:
    """Make granules of pairs with random ids of ragged lengths."""
    rng = np.random.default_rng(0)

    def lists(lengths: Sequence[int]) -> list[list[int]]:
        return [rng.integers(3, 700, n).tolist() for n in lengths]

    return [
        pa.table(
            {
                "group_id": [rng.bytes(16) for _ in range(groups)],
                "prompt_ids": lists(rng.integers(1, 60, groups).tolist()),
                "completion_ids": [lists(rng.integers(1, 40, 2).tolist()) for _ in range(groups)],
            },
            schema=GRANULE,
        )
        for _ in range(count)
    ]


def make_store(place: Path) -> ReferenceStore:
    return ReferenceStore(Storage(place), "model", Numerics("trainer", "test", "cpu", "float32", "float32"))


def stored(store: ReferenceStore, granules: Sequence[pa.Table]) -> np.ndarray:
    """Read all log-probs of granules, laid end to end."""
    keys = np.concatenate([store.keys(g) for g in granules])
    return store.fetch(store.index(), keys).flatten().to_numpy()


def train_config(workers: int) -> TrainConfig:
    return TrainConfig(workers=workers, tokens_per_micro_batch=512)


def write_adapter(place: Path) -> Path:
    """Write a LoRA adapter of the built-in model that is felt."""
    torch.manual_seed(0)
    place.mkdir()
    weights = {}
    for layer in (0, 1):
        for name, out in (("q_proj", 128), ("v_proj", 64)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights |= {f"{key}.lora_A.weight": torch.randn(4, 128), f"{key}.lora_B.weight": 0.05 * torch.randn(out, 4)}
    save_file(weights, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


@pytest.mark.long
def test_one_worker_and_two_score_alike_and_each_granule_once(tmp_path: Path) -> None:
    granules = make_granules(3, 17)
    refs = [ray.put(g) for g in granules]
    values: dict[int, np.ndarray] = {}
    for workers in (1, 2):
        store = make_store(tmp_path / str(workers))
        scored = list(score_with_trainer(SETTINGS, store, train_config(workers), refs, WORKER))
        assert sorted(s.granule for s in scored) == [0, 1, 2]
        assert {(s.groups, s.sequences, s.unscored) for s in scored} == {(17, 34, ())}
        assert len(store.segments()) == 3 * workers  # a segment of each rank for each granule
        values[workers] = stored(store, granules)
    assert np.isfinite(values[1]).all()
    assert values[1].std() > 1
    np.testing.assert_allclose(values[1], values[2], rtol=3e-7, atol=1e-6)  # of -14 nats, float32 knows no more
    assert list(score_with_trainer(SETTINGS, store, train_config(2), [], WORKER)) == []


def worker_pids() -> set[int]:
    """Find the living training workers among this process's own descendants."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "TrainWorker" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def test_a_killed_worker_costs_its_granule_and_nothing_else(tmp_path: Path) -> None:
    granules = make_granules(60, 24)
    store = make_store(tmp_path)
    scored: list[Scored] = []
    before: set[int] = set()
    after: set[int] = set()
    for granule in score_with_trainer(SETTINGS, store, train_config(2), [ray.put(g) for g in granules], WORKER):
        scored.append(granule)
        if not before:
            before = worker_pids()
            assert len(before) == 2
            os.kill(max(before), signal.SIGKILL)
        after |= worker_pids() - before
    assert len(after) == 2
    assert sorted(s.granule for s in scored) == list(range(60))
    assert {(s.groups, s.sequences, s.unscored) for s in scored} == {(24, 48, ())}
    # At the moment of the kill one granule was not whole, of which a rank's segment may have been there.
    assert 120 <= len(store.segments()) <= 122
    assert len(stored(store, granules)) == sum(
        len(c) for g in granules for row in g.to_pylist() for c in row["completion_ids"]
    )


@pytest.mark.long
def test_policy_and_reference_are_the_model_in_four_bits(tmp_path: Path) -> None:
    """Step 1's loss is ln 2 only if both are: a model that is rounded so is another one."""
    pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'")
    lora = ("train.quantization=nf4", "train.lora.rank=4", "train.optimizer.type=adamw_8bit")
    lora += ("train.optimizer.warmup_fraction=0",)  # or the first step has rate 0
    run, _ = offline(
        small_recipe(tmp_path, "reference.engine=trainer", "train.workers=2", "train.steps=2", *lora), Reporter()
    )
    first, second = (json.loads(line)["loss"] for line in run.train.read_bytes("metrics.jsonl").splitlines()[:2])
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second != first
    assert run.train.manifest.figures["audit"]["max_token_drift"] < 1e-5
    assert {"policy/adapter_config.json", "policy/adapter_model.safetensors"} <= set(run.train.names("policy/"))
    assert run.plan.numerics.dtype == "float32, nf4"  # no other run takes these for the model's


@pytest.mark.long
def test_policy_and_reference_are_the_model_with_its_adapter(tmp_path: Path) -> None:
    """Step 1's loss is ln 2 only if the adapter is in both; the policy that comes out is a whole model with it."""
    adapter = write_adapter(tmp_path / "adapter")
    run, _ = offline(
        small_recipe(
            tmp_path, "reference.engine=trainer", "train.workers=2", "train.steps=1", f"model.adapter={adapter}"
        ),
        Reporter(),
    )
    first = json.loads(run.train.read_bytes("metrics.jsonl").splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.train.manifest.figures["audit"]["max_token_drift"] < 1e-5

    directory = run.train.local_dir("policy", tmp_path / "policy")
    assert not list(directory.glob("adapter*"))
    assert f"with the LoRA adapter `{adapter}` merged into it" in (directory / "README.md").read_text()
    name = "model.layers.0.self_attn.v_proj"
    lora = load_file(adapter / "adapter_model.safetensors")
    delta = 2 * lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"]
    base, trained = (load_file(d / "model.safetensors") for d in (MODEL, directory))
    assert base.keys() <= trained.keys()
    moved = trained[f"{name}.weight"] - base[f"{name}.weight"]
    assert float(delta.abs().mean()) > 0.05
    assert float((moved - delta).abs().max()) < 1e-3  # a step of AdamW moves a weight by about the learning rate, 3e-4
