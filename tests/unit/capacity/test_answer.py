"""What `dpo-ray plan --cluster` says of the published recipes, and of what it cannot plan. Nothing here has a network or a GPU."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dpo_ray.capacity.answer import Capacity
from dpo_ray.capacity.hardware import GPUS, parse_cluster
from dpo_ray.capacity.model_sizes import model_sizes
from dpo_ray.capacity.workload import Workload, measured_workload, micro_batches
from dpo_ray.cli import capacity_view
from dpo_ray.cli.app import main
from dpo_ray.config.load import load_recipe
from dpo_ray.config.model import ModelConfig
from dpo_ray.data.groups import TokenGroup
from dpo_ray.data.schemas import shard_table
from dpo_ray.data.statistics import measure
from dpo_ray.errors import ConfigError
from dpo_ray.models.work import PEAK_FLOPS

PIPELINES = Path(__file__).parents[3] / "pipelines"
RECIPES = sorted(path.stem for path in PIPELINES.glob("*.yaml"))
OF_LOCAL_MODELS = ("hh_rlhf", "hh_pandalm")  # which the user names


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: socket.socket, address: object) -> None:
        raise AssertionError(f"reached for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(PIPELINES.parent)


def capacity(name: str, cluster: str, *overrides: str) -> Capacity:
    return capacity_view.capacity_of(load_recipe(PIPELINES / f"{name}.yaml", list(overrides)), cluster)


def printed(found: Capacity) -> str:
    text = io.StringIO()
    capacity_view.print_capacity(found, Console(file=text, width=200))
    return text.getvalue()


def test_zephyr_fits_on_one_node() -> None:
    found = capacity("zephyr_7b_dpo", "1x8xH100")
    assert found.fits
    assert found.nearest is None
    assert found.changes == ()
    peak = found.training.memory.peak
    assert peak.weights + peak.optimizer == pytest.approx(7.24e9 * 12 / 8, rel=0.01)
    assert peak.whole_gradients == pytest.approx(29e9, rel=0.01)  # 16 groups of a rank may be more than one micro-batch
    assert 40e9 < peak.total < 60e9
    text = printed(found)
    assert text.startswith("zephyr-7b-dpo fits on 1x8xH100: ")
    assert "may have more than one micro-batch per rank" in text
    assert "7.24 B parameters" in text
    assert "an assumed mean of 256 tokens" in text  # what is not known is said
    assert [stage.stage for stage in found.stages] == ["reference", "train", "evaluate", "evaluate: samples"]
    assert 5 * 60 < sum(stage.seconds for stage in found.stages) < 3600


def test_70b_fits_on_sixteen_nodes_with_one_micro_batch_a_rank() -> None:
    found = capacity("tulu3_70b_dpo", "16x8xH100")
    assert found.fits
    assert found.training.batches.is_single_for_sure
    assert found.training.memory.peak.whole_gradients == 0
    assert "one micro-batch per rank and step" in printed(found)
    assert "64 of 128 GPUs train" in printed(found)
    smaller = capacity("tulu3_70b_dpo", "16x8xH100", "train.tokens_per_micro_batch=4096")
    assert not smaller.fits  # two micro-batches: 282 GB of whole gradients
    assert smaller.training.memory.peak.whole_gradients > 270e9
    assert any("whole float32 gradients" in problem for problem in smaller.problems)
    assert any(change.fits and "train.tokens_per_micro_batch=8192" in change.overrides for change in smaller.changes)


def test_70b_does_not_fit_on_one_node_and_the_nearest_is_named() -> None:
    found = capacity("tulu3_70b_dpo", "1x8xH100")
    assert not found.fits
    assert any("sharded over 8 ranks" in problem for problem in found.problems)
    assert any("more than one micro-batch per rank" in problem for problem in found.problems)
    assert found.nearest is not None
    text = printed(found)
    assert text.startswith("tulu3-70b-dpo does NOT fit on 1x8xH100")
    assert f"the smallest cluster of such nodes that fits: {found.nearest}" in text
    workers = found.nearest.gpus
    assert capacity("tulu3_70b_dpo", str(found.nearest), f"train.workers={workers}").fits
    assert any("train.lora.rank=16" in change.overrides and change.fits for change in found.changes)


def test_every_change_that_is_offered_is_one_that_the_recipe_takes() -> None:
    for change in capacity("tulu3_70b_dpo", "1x8xH100").changes:
        other = capacity("tulu3_70b_dpo", "1x8xH100", *change.overrides.split())
        assert other.training.memory.peak.total == pytest.approx(change.total_bytes)
        assert other.training.fits == change.fits


def test_rounds_sample_before_they_score_and_train() -> None:
    found = capacity("quickstart_online", "1x8xH100")
    assert found.steps == 3 * 1536 // 32
    assert [stage.stage for stage in found.stages[:3]] == ["sample", "reference", "train"]
    once = capacity("quickstart_online", "1x8xH100", "online.rounds=1")
    for stage, of_one in zip(found.stages[:3], once.stages[:3], strict=True):
        assert stage.flops == pytest.approx(3 * of_one.flops)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gets_an_answer_without_a_network(name: str) -> None:
    overrides = ["model.path=builtin:sentiment_llama"] if name in OF_LOCAL_MODELS else []
    found = capacity(name, "16x8xH100" if "70b" in name else "1x8xH100", *overrides)
    assert found.fits, found.problems
    assert json.loads(json.dumps(capacity_view.figures(found)))["fits"] is True
    assert printed(found)


@pytest.mark.parametrize(
    ("text", "nodes", "gpus", "name", "memory"),
    [
        ("4x8xH100", 4, 8, "H100", 80e9),
        ("8xH200", 1, 8, "H200", 141e9),
        ("2X4Xa100-40", 2, 4, "A100-40", 40e9),
        ("1x8xA100", 1, 8, "A100-80", 80e9),
        ("1x8xH100:94", 1, 8, "H100", 94e9),
    ],
)
def test_a_cluster_is_nodes_gpus_and_a_card(text: str, nodes: int, gpus: int, name: str, memory: float) -> None:
    cluster = parse_cluster(text)
    assert (cluster.nodes, cluster.gpus_per_node) == (nodes, gpus)
    assert (cluster.gpu.name, cluster.gpu.memory_bytes) == (name, memory)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("8H100", "does not describe a cluster"),
        ("", "does not describe a cluster"),
        ("4x8", "does not describe a cluster"),
        ("4x8xH100x2", "the GPU `H100x2` is not known"),
        ("-1x8xH100", "does not describe a cluster"),
        ("1x8xV100", "the GPU `V100` is not known"),
        ("0x8xH100", "a number of this cluster is 0"),
        ("1x8xH100:0", "a number of this cluster is 0"),
    ],
)
def test_a_wrong_cluster_is_one_clear_error(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        parse_cluster(text)
    assert "H100" in caught.value.fix or "at least 1" in caught.value.fix


def test_peaks_are_those_that_utilisation_is_measured_by() -> None:
    for name in ("H100", "H200", "B200", "L40S", "L4"):
        assert GPUS[name].bf16_flops == PEAK_FLOPS[name]
    assert GPUS["A100-80"].bf16_flops == PEAK_FLOPS["A100"]
    assert GPUS["H100-PCIE"].bf16_flops == PEAK_FLOPS["H100 PCIe"]


def test_a_model_whose_sizes_nobody_knows_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="its name is not among the known models"):
        model_sizes(ModelConfig(path="someone/unheard-of-9b"))


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    values = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(values))
    sizes = model_sizes(ModelConfig(path=str(tmp_path)))
    assert sizes.parameters == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64) + 2 * 100 * 64 + 64


def test_another_kind_of_block_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="does not support the architecture `gpt2`"):
        model_sizes(ModelConfig(path=str(tmp_path)))


def test_micro_batches_of_a_step_are_bounded_as_the_packing_deals_them() -> None:
    workload = Workload(1000, 2, 100, 100, 512, "made")
    single = micro_batches(workload, groups_per_step=16, ranks=8, budget_tokens=1024)
    assert single.is_single_for_sure
    assert (single.usual, single.tokens) == (1, 1024)
    several = micro_batches(workload, groups_per_step=32, ranks=8, budget_tokens=1024)
    assert not several.is_single_for_sure
    assert (several.usual, several.tokens) == (2, 1024)


def test_the_command_prints_it_and_gives_it_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["plan", str(PIPELINES / "hh_rlhf.yaml"), f"output={tmp_path}", "model.path=builtin:sentiment_llama"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--cluster", "1x8xH100"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert out.startswith("stages: cannot be determined on this machine: data.train=")  # its data is the user's
    assert "hh-rlhf fits on 1x8xH100" in out
    with pytest.raises(SystemExit):
        main([*arguments, "--cluster", "1x8xH100", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["stages"] is None
    assert values["capacity"]["fits"] is True
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--cluster", "1x8"])
    assert stopped.value.code == 2
    assert "does not describe a cluster" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_lengths_are_those_of_a_sample_and_of_the_prepared_tokens_once_there_are_any(tmp_path: Path) -> None:
    recipe = load_recipe(PIPELINES / "quickstart.yaml", [f"output={tmp_path}"])
    plan, unseen = capacity_view.plan_if_possible(recipe)
    assert plan is not None
    assert not unseen
    found = capacity_view.capacity_of(recipe, "1x1xH100", plan)
    assert found.workload.source == "the first 256 rows of 1 of 1 shards"
    assert found.workload.groups == 3200
    assert found.steps == 100
    assert 10 < found.workload.prompt_tokens < 40
    table = shard_table(
        [
            TokenGroup(np.arange(n, dtype=np.int32), [np.arange(4), np.arange(6)], [1, 0], [0], [1], 1.0, bytes(16))
            for n in (3, 5)
        ],
        [0, 1],
        None,
    )
    workload = measured_workload(recipe, {"synthetic": measure(table), "empty": measure(table.slice(0, 0))})
    assert (workload.groups, workload.completions) == (2, 2)
    assert (workload.prompt_tokens, workload.completion_tokens) == (4, 5)
    assert workload.longest_group_tokens == 5 + 2 * 6
