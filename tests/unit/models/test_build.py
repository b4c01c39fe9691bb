"""A policy that each rank reads its rows of is the one that is loaded as a whole, and no rank reads more than its rows."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_ray.config.train import TrainConfig
from dpo_ray.errors import ConfigError
from dpo_ray.models.build import build_policy
from dpo_ray.models.load import load_policy
from dpo_ray.models.sliced_weights import INDEX
from tests.helpers.families import plain_model
from tests.helpers.processes.build import CASES, CPU, build_rank
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def models(family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay side by side models in one file and in several, in bfloat16, and an adapter of the first."""
    place = tmp_path_factory.mktemp("models")
    plain_model(family("llama")).save_pretrained(place / "llama", max_shard_size="20KB")
    assert (place / "llama" / INDEX).is_file()
    for name in ("gemma2", "qwen2"):
        shutil.copytree(family(name), place / name)
    AutoModelForCausalLM.from_pretrained(family("llama"), dtype=torch.bfloat16).save_pretrained(place / "bfloat16")
    adapted = get_peft_model(plain_model(family("llama")), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(place / "adapter")
    return place


@pytest.mark.parametrize(
    "world", [pytest.param(n, marks=pytest.mark.slow if n == 2 else pytest.mark.long) for n in (1, 2, 3)]
)
def test_slices_make_the_whole_bit_for_bit(world: int, models: Path) -> None:
    run_ranks(build_rank, world, models)
    ranks = [json.loads((models / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    assert [rank["equal"] for rank in ranks] == [dict.fromkeys(CASES, True)] * world
    for name in ("llama", "gemma2"):
        sizes = [
            t.numel() * t.element_size() for f in (models / name).glob("*.safetensors") for t in load_file(f).values()
        ]
        read = [rank["read"][name] for rank in ranks]
        assert sum(read) == sum(sizes)  # each byte once, whatever is tied
        assert max(read) < 1.1 * sum(sizes) / world


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("model.norm.weight"), "the files do not contain the weight `model.norm.weight`"),
        (lambda w: w.update({"v_head.weight": torch.ones(3)}), "the model has no weight `v_head.weight`"),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(7, 32)}),
            "config.json sets another shape for the weight `lm_head.weight`",
        ),
    ],
)
def test_files_that_are_not_the_models_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], says: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    place = Path(shutil.copytree(family("llama"), tmp_path / "model"))
    weights = load_file(place / "model.safetensors")
    change(weights)
    (place / "model.safetensors").unlink()
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=says) as refused:
        build_policy(place, None, TrainConfig(), torch.float32, CPU)
    assert refused.value.where == f"model.path={place}"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16]
)  # of the forward pass; the master weights are float32
def test_names_that_transformers_converts_are_loaded_as_a_whole(
    dtype: torch.dtype, family: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here those of a model that was saved without its head's module around it."""
    place = Path(shutil.copytree(family("qwen2"), tmp_path / "model"))
    weights = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    bare = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(bare, place / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.INFO, "dpo_ray"):
        policy = build_policy(place, None, TrainConfig(), dtype, CPU)
    assert "each rank loads the whole model" in caplog.text
    for name, weight in weights.items():
        own = policy.model.get_parameter(name).to_local()
        assert own.dtype == torch.float32
        assert torch.equal(own, weight)


@pytest.mark.usefixtures("alone")
def test_master_weights_are_float32_where_rows_are_read(family: Callable[[str], Path]) -> None:
    policy = build_policy(family("llama"), None, TrainConfig(), torch.bfloat16, CPU)
    assert {p.to_local().dtype for p in policy.model.parameters()} == {torch.float32}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("files", ["llama", "bfloat16"])
def test_an_adapter_is_added_in_float32_whatever_the_files_are_in(files: str, models: Path) -> None:
    policy = build_policy(models / files, models / "adapter", TrainConfig(), torch.float32, CPU)
    whole = load_policy(models / files, torch.float32, 1024, models / "adapter")
    for name, weight in whole.named_parameters():
        assert torch.equal(policy.get_parameter(name).to_local(), weight), name
