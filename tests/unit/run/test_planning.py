"""A change of the recipe reaches exactly the stages whose results it can change."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_ray.artifacts.lease import Lease
from dpo_ray.artifacts.places import run_storage
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.config.load import apply_overrides, validate_recipe
from dpo_ray.config.recipe import Recipe
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.keys import shard_key
from dpo_ray.models.builtin import builtin_model
from dpo_ray.observe.progress import Reporter
from dpo_ray.run import planning
from dpo_ray.run.context import RunContext
from dpo_ray.run.planning import STAGES, Plan, make_plan
from dpo_ray.run.preflight import preflight
from tests.helpers.good_recipe import GOOD

ALL = set(STAGES)
FROM_REFERENCE = {"reference", "schedule", "train", "evaluate"}
FROM_SCHEDULE = {"schedule", "train", "evaluate"}
FROM_TRAIN = {"train", "evaluate"}
EVALUATE = {"evaluate"}
NOTHING: set[str] = set()


def recipe(output: Path, *overrides: str) -> Recipe:
    values = {"name": "planned", "output": str(output), "reference": {"engine": "trainer"}}
    return validate_recipe(apply_overrides(copy.deepcopy(GOOD) | values, list(overrides)))


def commit(plan: Plan, stages: Collection[str] = STAGES) -> None:
    """Commit artifacts without files, as if these stages had run."""
    for name in stages:
        planned = plan.stages[name]
        staging = planning.artifact_store(plan.recipe).begin(name, planned.key, plan.recipe.name)
        provenance = Provenance(planning.VERSIONS[name], planned.inputs, planned.config, planning.versions())
        provenance.commit(staging, [staging.write("data", b"x")], rows={}, figures={})


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """Return an output in which the unchanged recipe has run, and its plan."""
    output = tmp_path_factory.mktemp("committed") / "runs"
    plan = make_plan(recipe(output))
    commit(plan)
    return output, plan


def template(directory: Path) -> str:
    file = directory / "template.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return str(file)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("data.train.pairs=33", ALL),
        ("data.train.seed=1", ALL),
        ("data.eval.pairs=9", ALL),
        ("data.max_length_tokens=127", ALL),
        ("data.truncation=drop", ALL),
        ("data.rows_per_part=7", ALL),
        ("data.chat_template=TEMPLATE", ALL),
        ("data.chat_template_kwargs={enable_thinking: false}", ALL),
        ("data.chat_template_date=2026-01-01", ALL),
        ("data.max_prompt_tokens=100", ALL),
        ("data.pairing.pairs=all", ALL),
        ("data.pairing.annotators=majority", ALL),
        ("data.rules.special_tokens=allow", ALL),
        ("data.rules.dropped_content=keep", ALL),
        ("data.rules.control_characters=clean", ALL),
        ("data.rules.filters=['json:loads']", ALL),
        ("data.rules.near_duplicates=0.8", ALL),
        ("data.rules.conflicts=keep", ALL),
        ("data.rules.leakage=keep", ALL),
        ("data.train.max_groups=9", ALL),
        ("data.train.name=film-reviews", ALL),
        ("data.max_quarantined_fraction=0.5", NOTHING),
        ("reference.engine=vllm", FROM_REFERENCE),
        ("model.dtype=bfloat16", FROM_REFERENCE),
        ("seed=1", FROM_SCHEDULE),
        ("train.groups_per_step=8", FROM_SCHEDULE),
        ("train.epochs=2", FROM_SCHEDULE),
        ("train.steps=5", FROM_SCHEDULE),
        ("train.workers=2", FROM_SCHEDULE),
        ("train.tokens_per_micro_batch=4096", FROM_SCHEDULE),
        ("train.objective.beta=0.5", FROM_TRAIN),
        ("train.objective.label_smoothing=0.1", FROM_TRAIN),
        ("train.objective.type=ipo", FROM_TRAIN),
        ("train.optimizer.learning_rate=1e-3", FROM_TRAIN),
        ("train.optimizer.warmup_fraction=0.2", FROM_TRAIN),
        ("train.optimizer.decay=linear", FROM_TRAIN),
        ("train.optimizer.betas=[0.9, 0.95]", FROM_TRAIN),
        ("train.optimizer.max_grad_norm=null", FROM_TRAIN),
        ("train.eval_every_steps=5", FROM_TRAIN),
        ("train.shaping.wpo=true", FROM_TRAIN),
        ("train.shaping.ld_alpha=0.5", FROM_TRAIN),
        ("train.lora={rank: 4}", FROM_TRAIN),
        ("train.layout=packed", FROM_TRAIN),
        ("train.router_aux_loss=0.1", FROM_TRAIN),
        ("train.hang_seconds=60", NOTHING),
        ("train.sharding.cpu_offload=true", NOTHING),
        ("evaluate.sample_prompts=5", EVALUATE),
        ("evaluate.max_new_tokens=5", EVALUATE),
        ("evaluate.temperature=0.5", EVALUATE),
        ("evaluate.shown_samples=1", NOTHING),
        ("reference.audit.groups=0", FROM_TRAIN),
        ("reference.audit.groups=9", NOTHING),
        ("reference.audit.on_drift=warn", NOTHING),
        ("reference.audit.on_drift=use_trainer", NOTHING),
        ("reference.audit.max_bias=1", NOTHING),
        ("reference.replicas=2", NOTHING),
        ("cluster.roles.reference.cpus=2", NOTHING),
        ("reference.max_batched_tokens=4096", NOTHING),
        ("reference.groups_per_granule=7", NOTHING),
        ("reference.store=STORE", NOTHING),
        ("cluster.roles.train.cpus=2", NOTHING),
        ("train.checkpoint_every_steps=3", NOTHING),
        ("train.keep_checkpoints=5", NOTHING),
        ("train.max_failures=0", NOTHING),
        ("trackers=[]", NOTHING),
        ("ray.cpus=3", NOTHING),
        ("ray.address=auto", NOTHING),
        ("name=other", NOTHING),
    ],
)
def test_a_field_changes_exactly_the_stages_below_it(
    override: str, changed: set[str], committed: tuple[Path, Plan], tmp_path: Path
) -> None:
    output, before = committed
    override = override.replace("TEMPLATE", template(tmp_path)).replace("STORE", str(tmp_path))
    after = make_plan(recipe(output, override))
    assert {s for s in STAGES if after.stages[s].key != before.stages[s].key} == changed
    assert {s for s in STAGES if after.stages[s].state == "stale"} == changed
    assert {s for s in STAGES if after.stages[s].state == "done"} == ALL - changed
    assert after.done == (not changed)


@pytest.mark.parametrize("objective", ["sigmoid", "orpo"])
def test_a_quantized_model_is_trained_anew_with_a_reference_and_without(objective: str, tmp_path: Path) -> None:
    adapter = f"train.objective={{type: {objective}}}", "train.lora={rank: 4}"
    plan = make_plan(recipe(tmp_path, *adapter))
    commit(plan, plan.stages)
    quantized = make_plan(recipe(tmp_path, *adapter, "train.quantization=nf4"))
    assert quantized.stages["train"].state == "stale"
    assert "train.quantization: None -> nf4" in quantized.stages["train"].reason
    assert quantized.resume_key != plan.resume_key


def test_a_field_of_training_is_in_a_key_or_changes_no_weights(tmp_path: Path) -> None:
    stages = make_plan(recipe(tmp_path, "train.lora={rank: 4}", "train.quantization=nf4")).stages
    in_keys = stages["train"].config.keys() | stages["schedule"].config.keys()
    how_it_runs = {
        "min_workers",
        "max_failures",
        "hang_seconds",
        "sharding",
        "checkpoint_every_steps",
        "keep_checkpoints",
    }
    assert TrainConfig.model_fields.keys() - in_keys == how_it_runs


@pytest.mark.parametrize(
    ("override", "stage", "says"),
    [
        ("train.objective.beta=0.5", "train", "train.objective.beta: 0.1 -> 0.5"),
        ("train.optimizer.learning_rate=1e-3", "train", "train.optimizer.learning_rate: 5e-07 -> 0.001"),
        ("train.optimizer.max_grad_norm=null", "train", "train.optimizer.max_grad_norm: 1.0 -> None"),
        ("train.groups_per_step=8", "schedule", "groups_per_step: 64 -> 8"),
        ("seed=3", "schedule", "seed: 0 -> 3"),
        ("data.max_length_tokens=127", "prepare", "max_length_tokens: 128 -> 127"),
        ("data.truncation=drop", "prepare", "truncation: keep_start -> drop"),
        ("reference.engine=vllm", "reference", "reference.engine: trainer -> vllm"),
        ("model.dtype=bfloat16", "reference", "reference.dtype: float32 -> bfloat16"),
        ("evaluate.temperature=0.5", "evaluate", "evaluate.temperature: 1.0 -> 0.5"),
        ("data.train=[{type: synthetic, pairs: 32}, {type: synthetic, pairs: 9}]", "prepare", "2 -> 3 entries"),
        ("data.max_length_tokens=127", "train", "schedule changed"),
    ],
)
def test_the_reason_names_the_field_and_both_values(
    override: str, stage: str, says: str, committed: tuple[Path, Plan]
) -> None:
    assert says in make_plan(recipe(committed[0], override)).stages[stage].reason


def adapter(directory: Path, alpha: int) -> str:
    """Write a LoRA adapter of one layer of the built-in model."""
    config = json.loads((builtin_model("sentiment_llama") / "config.json").read_text())
    size, rank = config["hidden_size"], 2
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    weights = {
        f"{name}A.weight": np.ones((rank, size), np.float32),
        f"{name}B.weight": np.ones((size, rank), np.float32),
    }
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return str(directory)


def test_the_reason_says_that_it_is_another_adapter(committed: tuple[Path, Plan], tmp_path: Path) -> None:
    first, second = (f"model.adapter={adapter(tmp_path / str(alpha), alpha)}" for alpha in (4, 8))
    output, without = committed
    plan = make_plan(recipe(output, first))
    assert "reference.adapter: None -> " in plan.stages["reference"].reason
    assert plan.stages["reference"].key != without.stages["reference"].key
    assert make_plan(recipe(output, second)).stages["reference"].key != plan.stages["reference"].key
    assert make_plan(recipe(output, second)).model_digest != plan.model_digest


def test_the_reason_says_that_engines_are_cut_otherwise(tmp_path: Path) -> None:
    commit(make_plan(recipe(tmp_path, "reference.engine=vllm")))
    plan = make_plan(recipe(tmp_path, "reference.engine=vllm", "reference.tensor_parallel=2"))
    assert plan.stages["reference"].reason == "reference.tensor_parallel: 1 -> 2"
    assert {s for s in STAGES if plan.stages[s].state == "stale"} == FROM_REFERENCE


def test_without_artifacts_every_stage_is_missing_and_nothing_is_written(tmp_path: Path) -> None:
    plan = make_plan(recipe(tmp_path / "runs"))
    reasons = {s.reason for s in plan.stages.values() if s.state == "missing"}
    assert reasons == {"not run yet", "not run yet; 2 of 2 shards to tokenize"}
    assert all(s.state == "missing" for s in plan.stages.values())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_has_done_and_missing_stages(tmp_path: Path) -> None:
    commit(make_plan(recipe(tmp_path)), ("prepare", "reference"))
    states = {s.stage: s.state for s in make_plan(recipe(tmp_path)).stages.values()}
    assert states == dict.fromkeys(("prepare", "reference"), "done") | dict.fromkeys(FROM_SCHEDULE, "missing")


def test_a_deleted_artifact_is_not_done(committed: tuple[Path, Plan], tmp_path: Path) -> None:
    plan = make_plan(recipe(tmp_path))
    commit(plan)
    planning.artifact_store(plan.recipe).root.delete_tree(f"train-{plan.stages['train'].key}")
    again = make_plan(recipe(tmp_path))
    assert [s for s in STAGES if again.stages[s].state != "done"] == ["train"]
    assert not again.done


def test_a_raised_stage_version_makes_the_stage_stale(
    committed: tuple[Path, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(planning.VERSIONS, "train", planning.VERSIONS["train"] + 1)
    plan = make_plan(recipe(committed[0]))
    assert {s for s in STAGES if plan.stages[s].state == "stale"} == FROM_TRAIN
    assert "the stage's code changed" in plan.stages["train"].reason


def rows(path: Path, count: int) -> None:
    lines = [json.dumps({"prompt": f"p{i} ", "chosen": "good", "rejected": "bad"}) for i in range(count)]
    path.write_text("\n".join(lines))


def test_files_count_by_their_bytes_and_not_by_their_names(tmp_path: Path) -> None:
    first, renamed = tmp_path / "first.jsonl", tmp_path / "renamed.jsonl"
    rows(first, 5)
    key = make_plan(recipe(tmp_path / "runs", f"data.train={first}")).stages["prepare"].key
    first.rename(renamed)
    assert make_plan(recipe(tmp_path / "runs", f"data.train={renamed}")).stages["prepare"].key == key
    rows(renamed, 6)
    assert make_plan(recipe(tmp_path / "runs", f"data.train={renamed}")).stages["prepare"].key != key


def test_training_resumes_whatever_the_packing_and_only_then(tmp_path: Path) -> None:
    resume_key = make_plan(recipe(tmp_path)).resume_key
    for same in ("train.workers=4", "train.tokens_per_micro_batch=999", "train.checkpoint_every_steps=3"):
        assert make_plan(recipe(tmp_path, same)).resume_key == resume_key
    for other in ("seed=1", "train.groups_per_step=8", "train.objective.beta=0.3", "data.train.pairs=9"):
        assert make_plan(recipe(tmp_path, other)).resume_key != resume_key


def test_preflight_gives_the_shards_of_both_splits(tmp_path: Path) -> None:
    checked = preflight(recipe(tmp_path))
    assert [(s.split, s.kind) for s in checked.shards] == [("train", "synthetic"), ("eval", "synthetic")]
    assert checked.template == "plain"
    named = preflight(recipe(tmp_path, "data.eval={a: synthetic, b: synthetic}"))
    assert [s.split for s in named.shards] == ["train", "eval_a", "eval_b"]


@pytest.mark.parametrize(
    ("overrides", "tokenized_again"),
    [
        (["data.rules.conflicts=keep", "data.rules.leakage=keep", "data.train.max_groups=9"], False),
        (["data.train.name=film-reviews"], False),
        (["data.pairing.ties=keep"], True),
        (["data.rules.near_duplicates=0.8"], True),
        (["data.rules.dropped_content=keep"], True),
        (["data.rules.control_characters=clean"], True),
        (["data.max_length_tokens=100"], True),
    ],
)
def test_rules_over_all_rows_tokenize_nothing_again(
    overrides: list[str], tokenized_again: bool, tmp_path: Path
) -> None:
    before, after = ([shard_key(c) for c in make_plan(recipe(tmp_path, *o)).shard_configs] for o in ([], overrides))
    assert (before != after) == tokenized_again


def test_engines_split_the_model_as_the_recipe_asks(tmp_path: Path) -> None:
    plan = make_plan(recipe(tmp_path, "reference.engine=vllm", "reference.tensor_parallel=2"))
    settings = RunContext(plan, Reporter(), Lease(run_storage(plan.recipe))).scorer_settings()
    assert settings.tensor_parallel == 2
