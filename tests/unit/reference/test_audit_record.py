"""What a failed audit does to later plans, with artifacts committed by hand and nothing started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.reference import audit_record
from dpo_ray.run import planning
from dpo_ray.run.planning import STAGES, Plan, found, make_plan
from tests.unit.run.test_planning import commit, recipe

ENGINE = "reference.engine=vllm"
USE_TRAINER = "reference.audit.on_drift=use_trainer"


def measured(max_token_drift: float = 0.0, margin_error_nats: float = 0.0) -> dict[str, Any]:
    """Return the measures of an audit of 64 pairs."""
    return {
        "groups": 64,
        "paired_groups": 64,
        "pairs": 64,
        "tokens": 640,
        "mean_token_drift": 0.0,
        "max_token_drift": max_token_drift,
        "signed_bias": 0.0,
        "signed_bias_error": 0.0,
        "multiplicative_error": 1.0,
        "margin_error_nats": margin_error_nats,
        "margin_error_nats_per_token": margin_error_nats / 10,
        "length_correlation": 0.0,
        "worst_groups": [],
    }


def fail(plan: Plan, figures: dict[str, Any]) -> None:
    """Remember, as a run does whose audit has failed."""
    store, key = planning.artifact_store(plan.recipe), plan.stages["reference"].key
    audit_record.remember(
        store, key, planning.engine_version("trainer"), plan.recipe.name, figures, planning.versions()
    )


def scored(output: Path, *overrides: str) -> Plan:
    """Commit everything up to the schedule, scored by vLLM."""
    plan = make_plan(recipe(output, ENGINE, *overrides))
    commit(plan, ("prepare", "reference", "schedule"))
    return plan


def test_after_a_failed_audit_the_trainer_scores_and_the_plan_says_why(tmp_path: Path) -> None:
    before = scored(tmp_path)
    fail(before, measured(max_token_drift=3.0))
    plan = make_plan(recipe(tmp_path, ENGINE, USE_TRAINER))
    assert plan.numerics.engine == plan.recipe.reference.engine == "trainer"
    assert plan.drift == "max_token_drift 3 over 0.001"
    assert {s: plan.stages[s].state for s in STAGES} == {
        "prepare": "done",
        "reference": "stale",
        "schedule": "stale",
        "train": "missing",
        "evaluate": "missing",
    }
    assert plan.stages["reference"].reason.startswith(
        "the trainer scores: the audit of the engine's log-probs failed (max_token_drift 3 over 0.001)"
    )
    assert "reference.engine: vllm -> trainer" in plan.stages["reference"].reason
    assert plan.resume_key != before.resume_key


def test_it_is_the_plan_of_a_recipe_that_names_the_trainer(tmp_path: Path) -> None:
    fail(scored(tmp_path), measured(max_token_drift=3.0))
    plan = make_plan(recipe(tmp_path, ENGINE, USE_TRAINER))
    named = make_plan(recipe(tmp_path, "reference.engine=trainer", USE_TRAINER))
    assert {s: p.key for s, p in plan.stages.items()} == {s: p.key for s, p in named.stages.items()}
    assert plan.resume_key == named.resume_key


def test_a_run_that_fell_back_is_done_and_still_says_why(tmp_path: Path) -> None:
    fail(scored(tmp_path), measured(max_token_drift=3.0))
    commit(make_plan(recipe(tmp_path, ENGINE, USE_TRAINER)), ("reference", "schedule", "train", "evaluate"))
    again = make_plan(recipe(tmp_path, ENGINE, USE_TRAINER))
    assert again.done
    assert "the audit of the engine's log-probs failed" in again.stages["reference"].reason


@pytest.mark.parametrize(
    "overrides",
    [
        ["reference.audit.on_drift=stop"],
        ["reference.audit.on_drift=warn"],
        [USE_TRAINER, "reference.audit.groups=0"],
        [USE_TRAINER, "reference.audit.max_token_drift=4"],  # judged by the limits of the recipe that asks
        [USE_TRAINER, "model.dtype=bfloat16"],  # another reference
        [USE_TRAINER, "data.train.pairs=33"],
    ],
)
def test_otherwise_the_engine_scores(tmp_path: Path, overrides: list[str]) -> None:
    fail(scored(tmp_path), measured(max_token_drift=3.0))
    plan = make_plan(recipe(tmp_path, ENGINE, *overrides))
    assert plan.numerics.engine == "vllm"
    assert plan.drift == ""


def test_the_margin_is_judged_by_the_beta_of_the_recipe_that_asks(tmp_path: Path) -> None:
    fail(scored(tmp_path), measured(margin_error_nats=5e-3))
    for beta, engine in ((0.1, "vllm"), (0.5, "trainer")):
        plan = make_plan(recipe(tmp_path, ENGINE, USE_TRAINER, f"train.objective.beta={beta}"))
        assert plan.numerics.engine == engine


def test_of_several_measurements_one_is_enough(tmp_path: Path) -> None:
    plan = scored(tmp_path)
    for most in (0.0, 3.0, 1e-5):
        fail(plan, measured(max_token_drift=most))
    fail(plan, measured(max_token_drift=3.0))  # the same again, by another run
    assert make_plan(recipe(tmp_path, ENGINE, USE_TRAINER)).drift


def test_a_reference_that_is_made_again_is_audited_again(tmp_path: Path) -> None:
    plan = scored(tmp_path)
    fail(plan, measured(max_token_drift=3.0))
    planning.artifact_store(plan.recipe).root.delete_tree(f"reference-{plan.stages['reference'].key}")
    assert make_plan(recipe(tmp_path, ENGINE, USE_TRAINER)).numerics.engine == "vllm"
    commit(plan, ("reference",))
    assert make_plan(recipe(tmp_path, ENGINE, USE_TRAINER)).numerics.engine == "vllm"


def test_a_reference_that_was_not_committed_yet_is_remembered_too(tmp_path: Path) -> None:
    """Streaming trains before the artifact `reference` is there, and may commit it while training stops."""
    streaming = recipe(tmp_path, ENGINE, USE_TRAINER, "reference.mode=streaming")
    plan = make_plan(recipe(tmp_path, ENGINE))
    commit(plan, ("prepare",))
    fail(plan, measured(max_token_drift=3.0))
    after = make_plan(streaming)
    assert (after.numerics.engine, after.recipe.reference.mode) == ("trainer", "ahead")
    commit(plan, ("reference",))
    assert make_plan(streaming).numerics.engine == "trainer"


def test_another_trainer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(scored(tmp_path), measured(max_token_drift=3.0))
    monkeypatch.setattr(planning, "engine_version", lambda engine: f"another {engine}")
    commit(make_plan(recipe(tmp_path, ENGINE)), ("reference",))
    assert make_plan(recipe(tmp_path, ENGINE, USE_TRAINER)).numerics.engine == "vllm"


def trained(output: Path, figures: dict[str, Any] | None, *overrides: str) -> Plan:
    """Commit a whole run whose audit measured this."""
    plan = make_plan(recipe(output, ENGINE, *overrides))
    commit(plan, set(STAGES) - {"train"})
    planned = plan.stages["train"]
    staging = planning.artifact_store(plan.recipe).begin("train", planned.key, plan.recipe.name)
    Provenance(planning.VERSIONS["train"], planned.inputs, planned.config, planning.versions()).commit(
        staging, [], rows={}, figures={"audit": figures}
    )
    return plan


@pytest.mark.parametrize("before", ["stop", "warn"])
@pytest.mark.parametrize("after", ["stop", "use_trainer", "warn"])
def test_what_passed_is_never_trained_again(tmp_path: Path, before: str, after: str) -> None:
    trained(tmp_path, measured(max_token_drift=1e-5), f"reference.audit.on_drift={before}")
    assert make_plan(recipe(tmp_path, ENGINE, f"reference.audit.on_drift={after}")).done


def test_what_was_trained_on_a_drifting_reference_counts_only_where_that_is_allowed(tmp_path: Path) -> None:
    trained(tmp_path, measured(max_token_drift=3.0), "reference.audit.on_drift=warn")
    assert make_plan(recipe(tmp_path, ENGINE, "reference.audit.on_drift=warn")).done
    assert make_plan(recipe(tmp_path, ENGINE, "reference.audit.max_token_drift=3")).done
    for on_drift in ("stop", "use_trainer"):
        plan = make_plan(recipe(tmp_path, ENGINE, f"reference.audit.on_drift={on_drift}"))
        assert plan.stages["train"].state == "stale"
        assert plan.stages["train"].reason == (
            f"it was trained although its audit failed (max_token_drift 3 over 0.001), and on_drift is {on_drift}"
        )
        assert found(plan, "train") is None
        assert not plan.done


def test_without_an_audit_another_policy_is_asked_for(tmp_path: Path) -> None:
    trained(tmp_path, None, "reference.audit.groups=0")
    assert make_plan(recipe(tmp_path, ENGINE, "reference.audit.groups=0")).done
    assert make_plan(recipe(tmp_path, ENGINE)).stages["train"].state == "stale"
    assert "train.audit: off -> made" in make_plan(recipe(tmp_path, ENGINE)).stages["train"].reason
