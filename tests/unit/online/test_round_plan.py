"""Which policies a round builds on, and which are reported, where some rounds were promoted and others were rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_ray.artifacts.places import artifact_store
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.config.load import load_recipe
from dpo_ray.online.round_plan import ARTIFACT_STAGE, Rounds, carries, derive, online_of
from dpo_ray.report.rounds_report import figures
from dpo_ray.run.planning import Plan, make_plan
from tests.conftest import REPOSITORY

PROVENANCE = Provenance(1, {}, {}, {})


def plan_of(root: Path, *overrides: str) -> Plan:
    recipe = REPOSITORY / "pipelines/quickstart_online.yaml"
    return make_plan(load_recipe(recipe, [f"output={root}", "online.rounds=4", "online.stop_if={}", *overrides]))


def measured(number: int) -> dict[str, Any]:
    """Return the figures of a round's evaluation; each number says of which round it is."""
    rates = {f"against_{whom}": {"rate": number / 10} for whom in ("previous", "initial")}
    words = {"mean_tokens": 9.0, "initial_mean_tokens": 9.0, "distinct_2": 0.5, "entropy": 3.0}
    return {**rates, **words, "true_reward": float(number), "kl": number / 100}


def decide(plan: Plan, *promoted: bool) -> Rounds:
    """Commit artifacts without files for all stages of the rounds, which end in these decisions."""
    store = artifact_store(plan.recipe)
    for number, decision in enumerate(promoted, 1):
        of_stage = {
            "pair": {"pairs": 5},
            "evaluate": measured(number),
            "promote": {"promoted": decision, "reasons": []},
        }
        for stage, planned in derive(plan).rounds[-1].stages.items():
            staging = store.begin(ARTIFACT_STAGE.get(stage, stage), planned.key, "run")
            policy = [staging.write("policy/README.md", b"")] if stage == "train" else []
            PROVENANCE.commit(staging, policy, rows={}, figures=of_stage.get(stage, {}))
    return derive(plan)


def test_a_round_starts_from_the_last_policy_that_was_promoted(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    keys = [r.trained.key for r in decide(plan, True, False).rounds]
    following = derive(plan).rounds[2]
    assert following.number == 3
    assert following.start.key == keys[0]
    assert following.stages["sample"].inputs["policy"] == keys[0]


@pytest.mark.parametrize(("optimizer", "carried"), [("carry", True), ("restart", False)])
def test_the_optimizer_state_comes_from_the_round_that_the_policy_comes_from(
    tmp_path: Path, optimizer: str, carried: bool
) -> None:
    plan = plan_of(tmp_path, f"online.optimizer={optimizer}")
    rounds = decide(plan, True, False)
    following, first = rounds.rounds[2], rounds.rounds[0]
    source = carries(online_of(plan.recipe), rounds.rounds[:2])
    assert source == (first if carried else None)
    assert following.stages["train"].config.get("moments") == (first.trained.key if carried else None)


def test_what_is_reported_is_of_the_policy_that_is_kept(tmp_path: Path) -> None:
    told = figures(decide(plan_of(tmp_path), True, True, False))
    assert (told["rounds"], told["promoted"], told["pairs"]) == (3, 2, 15)
    assert (told["true_reward"], told["win_rate"], told["kl"]) == (2.0, 0.2, 0.02)


def test_nothing_is_reported_of_rounds_that_were_all_rejected(tmp_path: Path) -> None:
    told = figures(decide(plan_of(tmp_path), False))
    assert (told["rounds"], told["promoted"]) == (1, 0)
    assert (told["true_reward"], told["win_rate"], told["policy"]) == (None, None, None)
