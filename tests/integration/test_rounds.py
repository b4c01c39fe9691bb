"""Online rounds end to end on real engines: what they sample and score is what a fresh engine and a plain model say."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.tables import read_table
from dpo_ray.config.recipe import Recipe
from dpo_ray.models.builtin import builtin_model
from dpo_ray.observe.progress import Reporter
from dpo_ray.online.prompts import heldout_keys
from dpo_ray.online.round_plan import Round, Rounds, derive
from dpo_ray.online.rounds import online
from dpo_ray.online.sample import SampledPrompt, read_samples
from dpo_ray.reference.engine import Engine, start_sampling_vllm
from dpo_ray.reference.sampling import Sampling, prompt_key, prompt_table
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.report.rounds_report import figures, rounds_page
from dpo_ray.run.planning import make_plan
from dpo_ray.schedule.order import step_groups
from tests.integration.conftest import small_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

PROMPTS, NEW_TOKENS = 48, 40
ONLINE = {
    "rounds": 2,
    "prompts_per_round": PROMPTS,
    "sampling": {"samples_per_prompt": 2, "max_new_tokens": NEW_TOKENS, "prompts_per_granule": 32},
    "judge": {"type": "function", "function": "dpo_ray.data.synthetic.true_rewards"},
    "evaluate": {"prompts": 16},
}


def rounds_recipe(output: Path, *overrides: str, **online: object) -> Recipe:
    recipe = small_recipe(output, "name=rounds", "train.eval_every_steps=null", *overrides)
    return Recipe.model_validate(recipe.model_dump(mode="json") | {"online": ONLINE | online})


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rounds")


@pytest.fixture(scope="module")
def committed(output: Path) -> dict[str, int]:
    """Kill the driver when the first round has a checkpoint; return when each artifact was committed by then."""
    recipe, log = output / "recipe.yaml", output / "log"
    recipe.write_text(yaml.safe_dump(rounds_recipe(output, mix={"offline": 0.25}).model_dump(mode="json")))
    with log.open("w") as stream:
        driver = subprocess.Popen([sys.executable, "-m", "dpo_ray", "run", recipe], stdout=stream, stderr=stream)
        deadline = time.monotonic() + 400
        while not any(output.glob("rounds/checkpoints/*/step-*.json")):
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        driver.kill()
        driver.wait()
    return {str(file): file.stat().st_mtime_ns for file in output.glob("artifacts/*/manifest.json")}


@pytest.fixture(scope="module")
def finished(ray_cluster: None, output: Path, committed: dict[str, int]) -> Rounds:
    said = io.StringIO()
    rounds, ran = online(rounds_recipe(output, mix={"offline": 0.25}), Reporter(Console(file=said, width=200)))
    assert ran
    assert "resuming from the checkpoint of step" in said.getvalue()
    return rounds


def samples_of(artifact: Artifact) -> list[SampledPrompt]:
    return list(read_samples(artifact))


def pairs_of(artifact: Artifact) -> list[dict]:
    return [row for name in artifact.names("train/") for row in read_table(artifact, name).to_pylist()]


def test_a_killed_driver_loses_nothing_that_was_committed(finished: Rounds, committed: dict[str, int]) -> None:
    """In every state, and against an undisturbed run: tests/chaos/test_kill_rounds.py."""
    stages = {Path(file).parent.name.partition("-")[0] for file in committed}
    assert stages >= {"prepare", "sample", "judge", "pair", "reference", "schedule"}
    assert {file: Path(file).stat().st_mtime_ns for file in committed} == committed


def test_every_round_is_decided_and_nothing_is_left_to_run(finished: Rounds, output: Path) -> None:
    assert [r.committed.promoted for r in finished.rounds] == [True, True]
    assert finished.rounds[1].start == finished.rounds[0].trained
    assert figures(finished)["rounds"] == 2
    again, ran = online(rounds_recipe(output, mix={"offline": 0.25}), Reporter())
    assert not ran
    assert again.rounds == finished.rounds


def test_the_page_shows_what_was_measured(finished: Rounds) -> None:
    page = rounds_page(finished)
    measured = [r.artifacts["evaluate"].manifest.figures for r in finished.rounds]
    assert [row.kl for row in page.rows] == [m["kl"] for m in measured]
    assert [row.starts_from for row in page.rows] == [None, 1]
    assert [[number for number, _, _ in sample.by_round] for sample in page.samples] == [[0, 1, 2]] * 6
    assert page.initial["true_reward"] == measured[0]["initial"]["true_reward"]
    rate = measured[1]["against_initial"]
    assert page.rows[1].win_rate_initial == (rate["rate"], rate["low"], rate["high"])


def test_rounds_sample_for_fresh_prompts_that_evaluation_does_not_use(finished: Rounds) -> None:
    heldout = heldout_keys(tokens_of(finished))
    first, second = ({p.key for p in samples_of(r.artifacts["sample"])} for r in finished.rounds)
    assert len(first) == len(second) == PROMPTS
    assert not first & second
    assert not (first | second) & heldout


def tokens_of(rounds: Rounds) -> Artifact:
    from dpo_ray.run.planning import found

    tokens = found(make_plan(rounds.plan.recipe), "prepare")
    assert tokens is not None
    return tokens


def test_the_better_completion_of_a_pair_has_the_higher_reward(finished: Rounds) -> None:
    for one in finished.rounds:
        own = [p for p in pairs_of(one.artifacts["pair"]) if p["source"] == f"round-{one.number:03d}"]
        mixed = [p for p in pairs_of(one.artifacts["pair"]) if p["source"] != f"round-{one.number:03d}"]
        assert all(p["scores"][p["chosen"][0]] > p["scores"][p["rejected"][0]] for p in own)
        assert len(mixed) == round(len(own) / 3)  # a quarter of all


def test_a_rounds_samples_are_those_of_a_fresh_engine_on_the_exported_policy(finished: Rounds) -> None:
    """A stale weight, cache or adapter of the living engine would show."""
    one = finished.rounds[1]
    exported = finished.rounds[0].artifacts["train"].storage.local_path("policy")
    sampled = samples_of(one.artifacts["sample"])
    settings = engine_settings(exported)
    engine = ray.remote(Engine).options(num_cpus=1).remote("fresh", settings, None, start_sampling_vllm)
    ray.get(engine.start.remote())
    tokens = finished.plan.recipe.online.sampling
    sampling = Sampling(tokens.temperature, tokens.max_new_tokens, stops_of(finished))
    granule = prompt_table([p.prompt_ids for p in sampled[:32]], finished.plan.recipe.seed, 2, 2)
    fresh = ray.get(engine.sample.remote(granule, 0, None, sampling)).table
    ray.kill(engine)
    assert fresh["completion_ids"].to_pylist() == [[list(c) for c in p.completion_ids] for p in sampled[:32]]
    assert fresh["ended"].to_pylist() == [list(p.ended) for p in sampled[:32]]


def engine_settings(model: Path) -> ScorerSettings:
    return ScorerSettings("vllm", str(model), "float32", "cpu", 128 + NEW_TOKENS, None, 0.85, share_prompt=True)


def stops_of(rounds: Rounds) -> tuple[int, ...]:
    from dpo_ray.data.tokenizing.chat import load_tokenizer
    from dpo_ray.data.tokenizing.tokenize import stop_tokens

    model = builtin_model("sentiment_llama")
    return stop_tokens(load_tokenizer(str(model)), "plain", rounds.plan.recipe.data, model)


def plain_logps(model, prompt: list[int], completion: list[int]) -> np.ndarray:
    with torch.no_grad():
        logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logps[rows, torch.tensor(completion)].numpy()


def test_reference_log_probs_of_a_later_round_are_the_initial_models(finished: Rounds) -> None:
    """The engines had sampled from the policy just before."""
    model = AutoModelForCausalLM.from_pretrained(builtin_model("sentiment_llama"), dtype=torch.float32)
    one = finished.rounds[1]
    (name,) = one.artifacts["pair"].names("train/")
    groups = read_table(one.artifacts["pair"], name).to_pylist()
    scored = read_table(one.artifacts["reference"], name)["token_logps"].to_pylist()
    for group, logps in list(zip(groups, scored, strict=True))[:12]:
        for completion, own in zip(group["completion_ids"], logps, strict=True):
            np.testing.assert_allclose(own, plain_logps(model, group["prompt_ids"], completion), atol=1e-4)


def test_the_divergence_is_that_of_the_exported_policy_to_the_initial_model(finished: Rounds) -> None:
    one = finished.rounds[1]
    policy, initial = (
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)
        for d in (one.artifacts["train"].storage.local_path("policy"), builtin_model("sentiment_llama"))
    )
    found = [s for s in samples_by_policy(finished, one.trained.key) if len(s.completion_ids) == 1]
    assert len(found) == 16
    differences = [
        float(
            (plain_logps(policy, list(s.prompt_ids), list(c)) - plain_logps(initial, list(s.prompt_ids), list(c))).sum()
        )
        for s in found
        for c in s.completion_ids
    ]
    assert one.artifacts["evaluate"].manifest.figures["kl"] == pytest.approx(np.mean(differences), abs=1e-3)


def samples_by_policy(rounds: Rounds, policy: str) -> list[SampledPrompt]:
    from dpo_ray.artifacts.places import artifact_store

    store = artifact_store(rounds.plan.recipe)
    manifests = [m for m in store.manifests("sample") if m.inputs["policy"] == policy and "heldout_prompts" in m.config]
    (artifact,) = [a for m in manifests if (a := store.find("sample", m.key))]
    return samples_of(artifact)


@pytest.mark.long
def test_more_rounds_go_on_from_the_last_and_a_rejected_one_keeps_the_policy(finished: Rounds, output: Path) -> None:
    """No policy gains so much in a round: the third is rejected, and then the fourth starts from the second as well."""
    raised = rounds_recipe(output, mix={"offline": 0.25}, rounds=3)
    rounds, ran = online(raised, Reporter())
    assert ran
    assert rounds.rounds[:2] == finished.rounds
    assert rounds.rounds[2].start == rounds.rounds[1].trained
    strict = derive(
        make_plan(rounds_recipe(output, mix={"offline": 0.25}, rounds=3, promote_if={"min_true_reward_gain": 99}))
    )
    assert "promote" not in strict.rounds[0].artifacts  # other rules, another decision
    assert strict.rounds[0].stages["train"] == finished.rounds[0].stages["train"]


@pytest.mark.long
@pytest.mark.parametrize(
    "section",
    [
        {"reference": "ema", "ema_decay": 0.5, "optimizer": "carry"},
        {"reference": "previous", "mix": {"earlier_rounds": 0.25}, "promote_if": {"max_kl": 1e-9}},
    ],
    ids=["ema-carry", "previous-rejected"],
)
def test_other_references_optimizers_and_rejected_rounds(tmp_path: Path, section: dict) -> None:
    rounds, _ = online(rounds_recipe(tmp_path, **section), Reporter())
    first, second = rounds.rounds
    trained = second.artifacts["train"].manifest.figures
    assert np.isfinite(trained["final"]["loss"])
    if "max_kl" in section.get("promote_if", {}):
        assert [r.committed.promoted for r in rounds.rounds] == [False, False]
        assert second.start == first.start == rounds.initial
        assert rounds.promoted == rounds.initial
    else:
        assert second.reference is not None
        assert second.reference.artifact is not None
        means, policies, initials = (
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).state_dict()
            for d in (
                second.reference.artifact.storage.local_path("policy"),
                first.artifacts["train"].storage.local_path("policy"),
                builtin_model("sentiment_llama"),
            )
        )
        for name, mean in means.items():
            torch.testing.assert_close(mean, 0.5 * initials[name] + 0.5 * policies[name], rtol=0, atol=1e-6)
        steps = [steps_of_moments(r.artifacts["train"]) for r in (first, second)]
        assert steps == [{3.0}, {6.0}]  # Adam's own count: the second round's optimizer is the first's


def steps_of_moments(trained: Artifact) -> set[float]:
    moments = load(trained.read_bytes("moments.safetensors"))
    return {float(value) for name, value in moments.items() if name.endswith("//step")}


@pytest.mark.long
def test_ranked_lists(tmp_path: Path) -> None:
    sampling = ONLINE["sampling"] | {"samples_per_prompt": 3}
    recipe = rounds_recipe(tmp_path, "train.objective={type: listwise}", sampling=sampling, pairing={"pairs": "list"})
    rounds, _ = online(recipe, Reporter())
    for one in rounds.rounds:
        groups = pairs_of(one.artifacts["pair"])
        assert {len(g["completion_ids"]) for g in groups} <= {2, 3}
        assert all(g["scores"] == sorted(g["scores"], reverse=True) for g in groups)
        assert np.isfinite(one.artifacts["train"].manifest.figures["final"]["loss"])


@pytest.mark.long
@pytest.mark.parametrize("objective", ["{type: kto}", "{type: simpo}"], ids=["kto", "simpo"])
def test_objectives_of_other_kinds(tmp_path: Path, objective: str) -> None:
    """One that learns from completions, with an estimate of the divergence; and one without a reference."""
    rounds, _ = online(rounds_recipe(tmp_path, f"train.objective={objective}"), Reporter())
    assert [r.committed.promoted for r in rounds.rounds] == [True, True]
    second = rounds.rounds[1]
    assert ("reference" in second.artifacts) == ("kto" in objective)
    steps = [json.loads(line) for line in second.artifacts["train"].read_bytes("metrics.jsonl").splitlines()]
    assert all(np.isfinite(step["loss"]) for step in steps)
    if "kto" in objective:
        assert steps[-1]["kl"] != 0  # of completions of other prompts


@pytest.mark.long
def test_adapters_go_on_from_round_to_round_on_one_base(tmp_path: Path) -> None:
    """Base and adapter merged by hand say what the engines and the trainer said of the policy."""
    recipe = rounds_recipe(tmp_path, "train.lora={rank: 4, alpha: 8, target_modules: [q_proj, v_proj]}")
    rounds, _ = online(recipe, Reporter())
    first, second = rounds.rounds
    places = [r.artifacts["train"].storage.local_path("policy") for r in (first, second)]
    assert all((place / "adapter_config.json").exists() for place in places)
    initial = AutoModelForCausalLM.from_pretrained(builtin_model("sentiment_llama"), dtype=torch.float32)
    merged = []
    for place in places:
        model = AutoModelForCausalLM.from_pretrained(builtin_model("sentiment_llama"), dtype=torch.float32)
        merged.append(PeftModel.from_pretrained(model, str(place)).merge_and_unload())
    (name,) = second.artifacts["pair"].names("train/")
    groups = read_table(second.artifacts["pair"], name).to_pylist()
    scored = read_table(second.artifacts["reference"], name)["token_logps"].to_pylist()
    margins = []
    for group, logps in zip(groups, scored, strict=True):
        both = [plain_logps(initial, group["prompt_ids"], c) for c in group["completion_ids"]]
        for own, plain in zip(logps, both, strict=True):
            np.testing.assert_allclose(own, plain, atol=1e-4)
        start = [plain_logps(merged[0], group["prompt_ids"], c).sum() for c in group["completion_ids"]]
        margins.append((start[0] - both[0].sum()) - (start[1] - both[1].sum()))
    (metrics,) = [x for x in second.artifacts["train"].read_bytes("metrics.jsonl").splitlines() if b'"step": 1,' in x]
    beta, said = recipe.train.objective.beta, json.loads(metrics)["rewards/margins"]
    assert said != 0  # round 2 begins where round 1 ended, not at the base
    schedule_first = set(first_step_groups(second))
    ours = [m for m, g in zip(margins, groups, strict=True) if g["group_id"] in schedule_first]
    assert said == pytest.approx(beta * float(np.mean(ours)), rel=1e-3, abs=1e-5)
    found = samples_by_policy(rounds, second.trained.key)
    differences = [
        float(
            (
                plain_logps(merged[1], list(s.prompt_ids), list(c)) - plain_logps(initial, list(s.prompt_ids), list(c))
            ).sum()
        )
        for s in found
        for c in s.completion_ids
    ]
    assert second.artifacts["evaluate"].manifest.figures["kl"] == pytest.approx(np.mean(differences), abs=1e-3)


def first_step_groups(one: Round) -> list[bytes]:
    (name,) = one.artifacts["pair"].names("train/")
    ids = read_table(one.artifacts["pair"], name, ["group_id"])["group_id"].to_pylist()
    steps = step_groups(ids, 0, 16, 1, None)
    return [ids[i] for i in next(iter(steps))]


def test_a_granule_depends_on_nothing_but_itself() -> None:
    """Seeds are the prompt's own: another order of prompts gives the same table of seeds, by prompt."""
    prompts = [(5, 6, 7), (8, 9)]
    one, other = prompt_table(prompts, 0, 1, 3), prompt_table(prompts[::-1], 0, 1, 3)
    by_prompt = dict(zip(one["group_id"].to_pylist(), one["seeds"].to_pylist(), strict=True))
    assert by_prompt == dict(zip(other["group_id"].to_pylist(), other["seeds"].to_pylist(), strict=True))
    seeds = [s for own in by_prompt.values() for s in own]
    assert len(set(seeds)) == 6
    assert set(by_prompt) == {prompt_key(p) for p in prompts}
