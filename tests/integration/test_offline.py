"""A whole offline run on real Ray, real vLLM and real FSDP2, and what running it again does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ray.observe.progress import Reporter
from dpo_ray.report import summary
from dpo_ray.run import planning
from dpo_ray.run.offline import Finished, offline
from dpo_ray.run.planning import make_plan
from tests.helpers.vllm_logps import vllm_logps
from tests.integration.conftest import small_recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offline")


@pytest.fixture(scope="module")
def finished(ray_cluster: None, output: Path) -> Finished:
    """The run that the tests of this module look at: two workers, a vLLM pool of two, sampling."""
    run, ran = offline(
        small_recipe(output, "train.workers=2", "reference.replicas=2", "evaluate.sample_prompts=8"), Reporter()
    )
    assert ran
    return run


def metrics(run: Finished) -> list[dict[str, float]]:
    return [json.loads(line) for line in run.train.read_bytes("metrics.jsonl").splitlines()]


def test_every_row_is_accounted_for_and_every_stage_committed(finished: Finished) -> None:
    rows = finished.prepare.manifest.rows
    for split, count in (("train", 96), ("eval", 24)):
        admitted, quarantined, duplicates = (rows[f"{split}/{w}"] for w in ("admitted", "quarantined", "duplicates"))
        assert rows[f"{split}/rows_in"] == count == admitted + quarantined + duplicates
    assert finished.reference.manifest.rows["groups"] == rows["train/admitted"] + rows["eval/admitted"]
    assert [m["step"] for m in metrics(finished)] == [1, 2, 3, 4, 5, 6]
    for artifact in (finished.prepare, finished.reference, finished.schedule, finished.train, finished.evaluate):
        artifact.verify()


def test_all_that_a_run_leaves_is_the_users_alone(finished: Finished, output: Path) -> None:
    """Written by the driver, by tasks, by engines and by training workers."""
    modes = {path: (path.is_dir(), oct(path.stat().st_mode & 0o7777)) for path in output.rglob("*")}
    assert {path: mode for path, mode in modes.items() if mode not in {(True, "0o700"), (False, "0o600")}} == {}


def test_the_first_step_starts_at_ln_2_and_the_audit_passed(finished: Finished) -> None:
    """The reference came from vLLM, the first loss from FSDP2: only if they agree is it ln 2."""
    assert metrics(finished)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    audit = finished.train.manifest.figures["audit"]
    assert audit["passed"]
    assert audit["groups"] >= 32
    assert audit["max_token_drift"] < 1e-4


def test_the_report_and_the_last_line(finished: Finished, output: Path) -> None:
    place = Path(summary.write_report(finished))
    html = place.read_text(encoding="utf-8")
    assert place == output / "small" / "report.html"
    assert "true reward" in html
    line = summary.line(summary.figures(finished))
    assert "rows_in=96 admitted=96 quarantined=0 left_out=0 duplicates=0 steps=6 final_loss=" in line
    assert f"report={place}" in line


def test_running_it_again_executes_nothing_and_writes_nothing(finished: Finished, output: Path, files_of) -> None:
    before = files_of(output)
    again, ran = offline(finished.plan.recipe, Reporter())
    assert not ran
    assert files_of(output) == before
    assert again.train.key == finished.train.key


def test_a_change_of_beta_runs_train_and_evaluate_only(finished: Finished, output: Path) -> None:
    changed = small_recipe(
        output,
        "train.workers=2",
        "reference.replicas=2",
        "evaluate.sample_prompts=8",
        "train.objective.beta=0.3",
        "train.steps=2",
    )
    plan = make_plan(
        small_recipe(
            output,
            "train.workers=2",
            "reference.replicas=2",
            "evaluate.sample_prompts=8",
            "train.objective.beta=0.3",
        )
    )
    states = {s.stage: s.state for s in plan.stages.values()}
    assert states == {
        "prepare": "done",
        "reference": "done",
        "schedule": "done",
        "train": "stale",
        "evaluate": "stale",
    }
    assert "train.objective.beta: 0.1 -> 0.3" in plan.stages["train"].reason
    assert "train changed" in plan.stages["evaluate"].reason
    shorter = make_plan(changed)
    assert shorter.stages["schedule"].state == "stale"
    assert shorter.stages["reference"].state == "done"


def test_the_policy_loads_in_transformers_and_in_vllm_and_they_agree(finished: Finished, tmp_path: Path) -> None:
    """Log-probs of held-out completions under the exported policy: plain transformers against a vLLM engine."""
    from dpo_ray.artifacts.tables import read_table

    directory = finished.train.local_dir("policy", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert "base_model" in (directory / "README.md").read_text()
    rows = read_table(finished.prepare, finished.prepare.names("eval/")[0]).slice(0, 8).to_pylist()
    prompts = [r["prompt_ids"] for r in rows]
    completions = [r["completion_ids"][0] for r in rows]

    by_vllm = vllm_logps(directory, 128, prompts, completions, tmp_path / "store")
    with torch.no_grad():
        for prompt, completion, expected in zip(prompts, completions, by_vllm, strict=True):
            logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            rows_of = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
            assert float(logps[rows_of, torch.tensor(completion)].sum()) == pytest.approx(expected, abs=1e-3)


def test_training_moved_the_policy_towards_the_preferences(finished: Finished) -> None:
    rows = metrics(finished)
    assert rows[-1]["eval_rewards/margins"] > rows[2]["eval_rewards/margins"] > 0
    samples = finished.evaluate.manifest.figures["samples"]
    assert samples["samples"] == 8
    assert samples["kl"] > -0.5


@pytest.mark.long
def test_trainer_scoring_gives_the_same_reference(finished: Finished, tmp_path: Path) -> None:
    """The exact fallback: another engine, another key, the same numbers; its first loss is ln 2 to rounding."""
    run, _ = offline(small_recipe(tmp_path, "reference.engine=trainer", "train.workers=2", "train.steps=1"), Reporter())
    assert metrics(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.prepare.key == finished.prepare.key
    assert run.reference.key != finished.reference.key
    for name in ("train/00000-00000-00000.parquet", "eval/00000-00000-00000.parquet"):
        ours, theirs = (flat_logps(artifact, name) for artifact in (run.reference, finished.reference))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def flat_logps(reference, name: str) -> np.ndarray:
    from dpo_ray.artifacts.tables import read_table

    groups = read_table(reference, name)["token_logps"].to_pylist()
    return np.array([value for group in groups for completion in group for value in completion])


@pytest.mark.long
def test_world_size_changes_nothing_but_speed(finished: Finished, output: Path) -> None:
    """One result, however it ran: in float32 the curves of 1 and 2 workers agree to 1e-5."""
    alone, _ = offline(
        small_recipe(output, "name=alone", "train.workers=1", "train.tokens_per_micro_batch=300"), Reporter()
    )
    for one, two in zip(metrics(alone), metrics(finished), strict=True):
        for name in ("loss", "rewards/margins", "grad_norm", "eval_loss"):
            if name in two:
                assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-5), name


@pytest.mark.long
def test_reference_scoring_is_shared_between_runs(finished: Finished, output: Path) -> None:
    """More data: only what is new is scored."""
    recipe = small_recipe(output, "name=more", "data.train={type: synthetic, pairs: 112}", "train.steps=1")
    run, _ = offline(recipe, Reporter())
    assert run.reference.manifest.figures["sequences"] == 2 * 16
    assert run.reference.manifest.figures["found"] == 2 * (96 + 24)
    assert planning.found(run.plan, "reference") is not None
