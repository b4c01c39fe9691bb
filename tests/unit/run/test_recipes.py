"""The recipes of pipelines/: sound, as published, and small enough for any machine with --tiny. Nothing here starts Ray."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from dpo_ray.cli.app import main
from dpo_ray.config.load import load_recipe, validate_recipe
from dpo_ray.config.model import is_hub_name
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import ConfigError
from dpo_ray.models.builtin import builtin_model
from dpo_ray.run import tiny
from dpo_ray.run.planning import make_plan
from dpo_ray.run.preflight import hardware, preflight
from dpo_ray.run.tiny import tiny_recipe

PIPELINES = Path(__file__).parents[3] / "pipelines"
RECIPES = sorted(path.stem for path in PIPELINES.glob("*.yaml"))
OF_LOCAL_FILES = ("hh_rlhf", "hh_pandalm")  # whose data the user names

# What the sources print: model, objective, learning rate, decay, pairs of a step (per GPU x accumulated x GPUs), tokens.
# zephyr-7b-beta/dpo/config_full.yaml and pref_align_scan of alignment-handbook, the pref-tuning post, run_mistral_orpo_beta.sh
# of xfactlab/orpo, llama-3-8b-instruct-simpo.yaml of princeton-nlp/SimPO, the card of NeuralHermes-2.5, open-instruct's tulu3.md.
PUBLISHED = {
    "zephyr_7b_dpo": ("zephyr-7b-sft-full", {"type": "sigmoid", "beta": 0.01}, 5e-7, "cosine", 8 * 2 * 8, 1024),
    "zephyr_7b_ipo": ("zephyr-7b-sft-full", {"type": "ipo", "beta": 0.01}, 5e-7, "cosine", 8 * 2 * 8, 1024),
    "zephyr_7b_kto": ("zephyr-7b-sft-full", {"type": "kto", "beta": 0.01}, 5e-7, "cosine", 8 * 2 * 8, 1024),
    "mistral_7b_orpo": ("Mistral-7B-v0.1", {"type": "orpo", "beta": 0.1}, 5e-6, "inverse_sqrt", 8 * 1 * 4, 2048),
    "llama3_8b_simpo": (
        "Meta-Llama-3-8B-Instruct",
        {"type": "simpo", "beta": 2.5, "gamma": 2.5 * 0.55},
        1e-6,
        "cosine",
        2 * 16 * 4,
        2048,
    ),
    "hermes_7b_dpo_lora": ("OpenHermes-2.5-Mistral-7B", {"type": "sigmoid", "beta": 0.1}, 5e-5, "cosine", 4 * 4, 1536),
    "tulu3_8b_dpo": (
        "Llama-3.1-Tulu-3-8B-SFT",
        {"type": "sigmoid_norm", "beta": 5},
        5e-7,
        "linear",
        1 * 16 * 8,
        2048,
    ),
    "tulu3_70b_dpo": (
        "Llama-3.1-Tulu-3-70B-SFT",
        {"type": "sigmoid_norm", "beta": 5},
        2e-7,
        "linear",
        1 * 2 * 64,
        2048,
    ),
}


@pytest.fixture(autouse=True)
def no_network(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail whatever would reach for the hub; models go into a cache of this session's own."""

    def refuse(_: socket.socket, address: object) -> None:
        raise AssertionError(f"reached for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(PIPELINES.parent)


def load(name: str, *overrides: str) -> Recipe:
    return load_recipe(PIPELINES / f"{name}.yaml", list(overrides))


def test_every_published_recipe_is_compared_with_its_source() -> None:
    assert set(PUBLISHED) == set(RECIPES) - {"quickstart", "quickstart_online", *OF_LOCAL_FILES}


@pytest.mark.parametrize("name", PUBLISHED)
def test_hyperparameters_are_those_of_the_source(name: str) -> None:
    model, objective, rate, decay, pairs, tokens = PUBLISHED[name]
    recipe = load(name)
    assert recipe.model.path.endswith(f"/{model}")
    assert recipe.train.objective.model_dump().items() >= objective.items()
    assert recipe.train.optimizer.learning_rate == rate
    assert recipe.train.optimizer.decay == decay
    assert recipe.train.groups_per_step == pairs
    assert recipe.data.max_length_tokens == tokens


def test_hardware_of_the_70b_holds_it() -> None:
    recipe = load("tulu3_70b_dpo")
    shard = recipe.train.sharding.shard_workers
    assert shard is not None
    assert 70.6e9 * 16 / shard < 0.6 * 80e9  # weights, gradients, two moments in float32; the rest is activations
    assert 70.6e9 * 2 / recipe.reference.tensor_parallel < 0.6 * 80e9


@pytest.mark.parametrize("name", [r for r in RECIPES if r not in OF_LOCAL_FILES])
def test_the_recipe_is_valid_and_can_be_planned_without_a_network(name: str, tmp_path: Path) -> None:
    recipe = load(name, f"output={tmp_path}", "ray.address=auto")  # the cluster has the GPUs that this machine lacks
    assert preflight(recipe).shards
    plan = make_plan(recipe)
    assert {stage.state for stage in plan.stages.values()} == {"missing"}
    assert ("reference" in plan.stages) == (recipe.train.objective.type not in ("orpo", "simpo"))
    assert list(tmp_path.iterdir()) == []


ORPO_TEMPLATE = (  # main.py of xfactlab/orpo
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_template_file_writes_what_the_published_one_writes(add_generation_prompt: bool) -> None:
    """A template file goes with a model of the hub as well, which `auto` leaves to the model."""
    assert preflight(load("zephyr_7b_dpo")).template == "auto"
    ours = preflight(load("mistral_7b_orpo")).template
    messages = [{"role": role, "content": f" {role} says\n"} for role in ("system", "user", "assistant", "user")]
    tokenizer = AutoTokenizer.from_pretrained(builtin_model("sentiment_llama"))
    written = [
        tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        for template in (ours, tiny.TEMPLATE, ORPO_TEMPLATE)
    ]
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("name", RECIPES)
def test_tiny_can_be_planned_and_keeps_what_the_recipe_is_about(name: str, tmp_path: Path) -> None:
    full = load(name, f"output={tmp_path}")
    small = tiny_recipe(full)
    plan = make_plan(small)
    assert plan.recipe.name == f"{full.name}-tiny"
    assert all(shard.kind == "synthetic" for shard in plan.checked.shards)
    assert plan.hardware.dtype == hardware(full).dtype
    for field in ("objective", "shaping", "optimizer", "lora", "layout", "best", "activation_checkpointing"):
        assert getattr(small.train, field) == getattr(full.train, field), field
    assert small.train.sharding.mode == full.train.sharding.mode
    assert small.data.eval_sets.keys() == full.data.eval_sets.keys()
    assert [s.weight for s in small.data.train] == [s.weight for s in full.data.train]
    assert (small.train.steps, small.train.groups_per_step, small.ray.address) == (3, 8, "local")
    assert small.cpus_needed() <= 4
    assert list(tmp_path.iterdir()) == []  # the model is in the cache


@pytest.mark.parametrize(
    ("path", "model_type"),
    [
        ("alignment-handbook/zephyr-7b-sft-full", "mistral"),
        ("teknium/OpenHermes-2.5-Mistral-7B", "mistral"),
        ("NousResearch/Hermes-3-Llama-3.1-8B", "llama"),
        ("allenai/tulu-2-7b", "llama"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2"),
        ("Qwen/Qwen3-8B", "qwen3"),
        ("google/gemma-2b-it", "gemma"),
        ("google/gemma-2-9b-it", "gemma2"),
        ("google/gemma-3-4b-it", "gemma3_text"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi3"),
        ("builtin:sentiment_llama", "llama"),
    ],
)
def test_the_family_follows_from_the_models_name(path: str, model_type: str) -> None:
    recipe = validate_recipe({"name": "r", "model": {"path": path}, "data": {"train": "synthetic"}})
    config = AutoConfig.from_pretrained(tiny_recipe(recipe).model.path)
    assert config.model_type == model_type
    assert config.hidden_size * config.num_hidden_layers < 512


def test_the_family_and_the_template_of_a_model_that_is_here_are_its_own(tmp_path: Path) -> None:
    model = tiny.tiny_model("qwen2", "{{ messages[0]['content'] }}")
    here = tmp_path / "llama-by-name-only"
    here.symlink_to(model)
    recipe = validate_recipe({"name": "r", "model": {"path": str(here)}, "data": {"train": "synthetic"}})
    assert Path(tiny_recipe(recipe).model.path) == model


def test_a_model_is_made_once_and_always_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = tiny.tiny_model("llama", tiny.TEMPLATE)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert tiny.tiny_model("llama", tiny.TEMPLATE) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    second = tiny.tiny_model("llama", tiny.TEMPLATE)
    weights, again = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert second != first
    assert weights.keys() == again.keys()
    assert all(weights[name].equal(again[name]) for name in weights)
    assert [p.name for p in second.parent.iterdir()] == [second.name]  # nothing half made stays


def test_a_model_of_no_known_family_is_refused_with_those_that_are_known() -> None:
    recipe = validate_recipe({"name": "r", "model": {"path": "lab/secret"}, "data": {"train": "synthetic"}})
    assert is_hub_name(recipe.model.path)
    with pytest.raises(ConfigError, match="its name shows no family") as refused:
        tiny_recipe(recipe)
    assert "llama, mistral, qwen2" in str(refused.value)


def test_hybrid_sharding_stays_hybrid_with_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    full = load("tulu3_70b_dpo")
    for cpus, gpus, expected in ((2, 0, (2, 1)), (8, 0, (4, 2)), (8, 1, (1, 1)), (64, 8, (4, 2))):
        monkeypatch.setattr("os.cpu_count", lambda cpus=cpus: cpus)
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        train = tiny_recipe(full).train
        assert (train.workers, train.sharding.shard_workers) == expected


def test_the_command_line_makes_a_recipe_tiny(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = str(PIPELINES / "mistral_7b_orpo.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["validate", recipe, f"output={tmp_path}", "train.objective.beta=0.2", "--tiny", "--json"])
    assert stopped.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["name"] == "mistral-7b-orpo-tiny"
    assert told["train"]["objective"] == {"type": "orpo", "beta": 0.2}
    assert told["data"]["train"][0]["type"] == "synthetic"
    with pytest.raises(SystemExit) as stopped:
        main(["plan", recipe, f"output={tmp_path}", "--tiny", "--json"])
    assert stopped.value.code == 0
    assert [s["stage"] for s in json.loads(capsys.readouterr().out)["stages"]] == [
        "prepare",
        "schedule",
        "train",
        "evaluate",
    ]
