"""The loop on the built-in model: stopped and resumed it ends with the same bits, and it reports what it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.train import BestConfig, TrainConfig
from dpo_ray.errors import StoppedError, TrainError
from dpo_ray.train.checkpoint.checkpoint import Checkpoints, Progress
from dpo_ray.train.checkpoint.manifest import committed_steps
from dpo_ray.train.evaluation import HELDOUT, evaluate, heldout_sums
from dpo_ray.train.loop import Extent, Wish, epochs_seen, has_ended, judged, no_wish, train
from dpo_ray.train.optimizers.build import build_optimizer, learning_rate_factor
from tests.helpers.training import (
    GROUPS_PER_STEP,
    LEARNING_RATE,
    STEPS,
    heldout_sets,
    make_config,
    make_policy,
    rank_steps,
    weights_of,
)

PLAN = Extent(total_steps=STEPS, groups=STEPS * GROUPS_PER_STEP, device=torch.device("cpu"))
CLOCK = ("seconds_per_step", "tokens_per_second", "data_wait_seconds", "memory_gib", "tflops")
CONFIG = make_config(checkpoint_every_steps=3, eval_every_steps=2)


class Run:
    """One process's life: it restores, trains the steps it is given, and is gone."""

    def __init__(self, place: Path, attempt: str) -> None:
        self.policy = make_policy()
        self.optimizer = build_optimizer(self.policy, CONFIG.optimizer)
        self.checkpoints = Checkpoints(Storage(place), attempt, 2)
        self.progress = self.checkpoints.load_newest(self.policy, self.optimizer)
        self.reported: list[dict[str, float]] = []

    def train(
        self, most_steps: int = STEPS, config: TrainConfig = CONFIG, wish: Callable[[], Wish] = no_wish
    ) -> Progress:
        steps = islice(rank_steps(1, 0), self.progress.step, self.progress.step + most_steps)
        return train(
            self.policy,
            self.optimizer,
            steps,
            {"eval": lambda: rank_steps(1, 0)[:2]},
            PLAN,
            config,
            self.checkpoints,
            self.progress,
            self.reported.append,
            wish,
        )


def timeless(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


@pytest.mark.parametrize("killed_after", [3, 5])  # right after a checkpoint; two steps later, which are lost
def test_interrupted_and_resumed_is_undisturbed(killed_after: int, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", "a-1")
    progress = whole.train()
    Run(tmp_path / "parts", "a-1").train(killed_after)
    second = Run(tmp_path / "parts", "a-2")
    assert second.progress.step == 3
    assert second.train() == progress
    expected = weights_of(whole.policy)
    assert all(torch.equal(w, expected[n]) for n, w in weights_of(second.policy).items())
    assert timeless(second.checkpoints.metrics(STEPS)) == timeless(whole.reported)
    finished = Run(tmp_path / "parts", "a-3")  # killed between the last checkpoint and the export
    assert finished.train() == progress
    assert finished.reported == []
    assert all(torch.equal(w, expected[n]) for n, w in weights_of(finished.policy).items())


def test_rows_say_what_was_done(tmp_path: Path) -> None:
    run = Run(tmp_path, "a-1")
    progress = run.train()
    tokens = np.cumsum([s.step_tokens for s in rank_steps(1, 0)])
    assert progress == Progress(STEPS, int(tokens[-1]))
    assert [r["step"] for r in run.reported] == list(range(1, STEPS + 1))
    assert [r["num_tokens"] for r in run.reported] == tokens.tolist()
    assert [r["epoch"] for r in run.reported] == pytest.approx([s / STEPS for s in range(1, STEPS + 1)])
    rates = [LEARNING_RATE * learning_rate_factor(s, STEPS, CONFIG.optimizer) for s in range(STEPS)]
    assert [r["learning_rate"] for r in run.reported] == pytest.approx(rates)
    assert ["eval_loss" in r for r in run.reported] == [False, True] * 3
    assert all(r["seconds_per_step"] > 0 and r["tokens_per_second"] > 0 for r in run.reported)
    # It learns: pairs of the first two steps are held out here, and are seen in training too.
    assert run.reported[5]["eval_loss"] < run.reported[1]["eval_loss"]


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"epochs": 3, "groups_per_step": 64}, [3.0]),  # 5 groups: one step of 15
        ({"epochs": 3, "groups_per_step": 4}, [0.8, 1.6, 2.4, 3.0]),
        ({"steps": 3, "groups_per_step": 4}, [0.8, 1.6, 2.4]),
        ({"steps": 2, "groups_per_step": 64}, [12.8, 25.6]),  # each step is full
    ],
)
def test_epochs_are_counted_by_the_groups_that_were_seen(settings: dict[str, int], seen: list[float]) -> None:
    config = TrainConfig(**settings)
    assert [epochs_seen(step, config, 5) for step in range(1, len(seen) + 1)] == pytest.approx(seen)


def test_a_failed_step_names_its_groups_and_is_in_no_checkpoint(tmp_path: Path) -> None:
    run, steps = Run(tmp_path, "a-1"), rank_steps(1, 0)
    bad = steps[3].micro_batches[0]
    poisoned = replace(bad, reference_token_logps=np.full_like(bad.reference_token_logps, np.nan))
    steps[3] = replace(steps[3], micro_batches=(poisoned, *steps[3].micro_batches[1:]))
    with pytest.raises(TrainError) as stopped:
        train(
            run.policy,
            run.optimizer,
            steps,
            {},
            PLAN,
            make_config(checkpoint_every_steps=1),
            run.checkpoints,
            run.progress,
            run.reported.append,
        )
    assert stopped.value.where.startswith("step 4, groups")
    assert bad.group_ids[0].hex() in stopped.value.where
    assert "learning_rate" in stopped.value.fix
    assert [r["step"] for r in run.reported[:-1]] == [1, 2, 3]
    assert run.reported[-1] == {"not_finite_step": 4}
    again = Run(tmp_path, "a-2")
    assert again.progress.step == 3
    assert all(torch.equal(w, weights_of(run.policy)[n]) for n, w in weights_of(again.policy).items())


def test_evaluation_is_the_weighted_mean_of_the_table_without_fillers(tmp_path: Path) -> None:
    policy = make_policy()
    shares = rank_steps(5, 4, tokens_per_micro_batch=30)[:2] + rank_steps(2, 0)[2:]
    _, table = heldout_sums(policy, shares, CONFIG, PLAN.device)
    of_fillers = [m for s in shares for m in s.micro_batches if not m.weight.any()]
    pairs = sum(len(m.group_ids) for s in shares for m in s.micro_batches) - len(of_fillers)
    assert of_fillers
    assert table.shape == (pairs, len(HELDOUT))
    assert policy.training
    column = dict(zip(HELDOUT, table.T.numpy(), strict=True))
    means = evaluate(policy, {"eval": lambda: shares}, CONFIG, PLAN.device)
    weight = column["weight"]
    assert set(weight) == {1.0, 0.5}
    expected = {
        "eval_loss": column["loss"],
        "eval_rewards/margins": column["reward_chosen"] - column["reward_rejected"],
        "eval_logps/rejected": column["logp_rejected"],
    }
    for name, values in expected.items():
        assert means[name] == pytest.approx((values * weight).sum() / weight.sum(), rel=1e-9)
    beta = CONFIG.objective.beta
    np.testing.assert_allclose(
        column["reward_chosen"], beta * (column["logp_chosen"] - column["reference_chosen"]), atol=1e-6
    )


def test_named_sets_are_measured_apart_and_together() -> None:
    policy, sets = make_policy(), heldout_sets(1, 0)
    means = evaluate(policy, sets, CONFIG, PLAN.device)
    together = [share for read in sets.values() for share in read()]
    pooled = evaluate(policy, {"eval": lambda: together}, CONFIG, PLAN.device)
    assert {"eval_loss", "eval_rewards/accuracies", "eval_logps/chosen", "eval_entropy"} <= pooled.keys()
    assert {n: means[n] for n in pooled} == pytest.approx(pooled, rel=1e-9)
    alone = {name: evaluate(policy, {"eval": read}, CONFIG, PLAN.device) for name, read in sets.items()}
    for name, expected in alone.items():
        assert {n: means[n.replace("eval", name, 1)] for n in expected} == expected
    assert len(means) == 3 * len(pooled)
    assert alone["eval_first"]["eval_loss"] != alone["eval_single"]["eval_loss"]


def test_without_held_out_groups_nothing_is_evaluated(tmp_path: Path) -> None:
    run = Run(tmp_path, "a-1")  # its configuration asks for evaluation every two steps
    steps = rank_steps(1, 0)[:2]
    train(run.policy, run.optimizer, steps, {}, PLAN, CONFIG, run.checkpoints, run.progress, run.reported.append)
    assert len(run.reported) == 2
    assert not any(name.startswith("eval_") for row in run.reported for name in row)


def best_of(*values: float, mode: str = "max", patience: int | None = None) -> tuple[int | None, int]:
    """Judge evaluations of steps 1, 2, ...; returns the best step, and the step at which training ends."""
    config, progress = BestConfig(metric="m", mode=mode, patience=patience), Progress()
    for step, value in enumerate(values, 1):
        progress = judged(replace(progress, step=step), {"m": value}, config)
        if has_ended(progress, config):
            break
    return progress.best.step if progress.best else None, progress.step


def test_the_first_of_the_best_evaluations_is_best() -> None:
    assert best_of() == (None, 0)
    assert best_of(0.5, 0.7, 0.7, 0.6) == (2, 4)
    assert best_of(0.5, 0.7, 0.4, 0.4, mode="min") == (3, 4)
    assert best_of(float("nan"), 0.1, float("nan"), 0.05) == (2, 4)
    assert best_of(0.3, float("nan"), 0.2, 0.1, patience=2) == (1, 3)
    assert best_of(0.3, 0.2, 0.4, 0.1, 0.4, patience=2) == (3, 5)


def test_a_metric_that_is_not_measured_is_named_with_those_that_are() -> None:
    with pytest.raises(TrainError, match="eval_los'") as refused:
        judged(Progress(1), {"eval_loss": 1.0, "eval_kl": 0.1}, BestConfig(metric="eval_los"))
    assert refused.value.fix == "use one of eval_kl, eval_loss"


def test_training_ends_early_at_the_same_step_however_often_it_is_interrupted(tmp_path: Path) -> None:
    best = BestConfig(metric="eval_loss", mode="max", patience=2)  # the loss falls: the first evaluation stays the best
    config = make_config(checkpoint_every_steps=None, eval_every_steps=1, best=best)
    whole = Run(tmp_path / "whole", "a-1")
    progress = whole.train(config=config)
    assert (progress.step, progress.best and progress.best.step) == (3, 1)
    assert committed_steps(Storage(tmp_path / "whole")) == [1, 3]
    for attempt in range(4):  # one step each
        part = Run(tmp_path / "parts", f"a-{attempt}")
        end = part.train(1, config=replace_field(config, checkpoint_every_steps=1))
    assert end == progress
    assert part.reported == []  # the fourth found that training had ended
    part.checkpoints.load(part.policy, part.optimizer, 1)
    whole.checkpoints.load(whole.policy, whole.optimizer, 1)
    expected = weights_of(whole.policy)
    assert all(torch.equal(w, expected[n]) for n, w in weights_of(part.policy).items())


def replace_field(config: TrainConfig, **changes: object) -> TrainConfig:
    return config.model_copy(update=changes)


def test_a_wish_to_stop_ends_training_after_a_checkpoint(tmp_path: Path) -> None:
    whole, wishes = Run(tmp_path / "whole", "a-1"), iter([Wish(), Wish(checkpoint=True), Wish(), Wish(stop=True)])
    whole.train()
    run, config = Run(tmp_path / "parts", "a-1"), make_config(checkpoint_every_steps=None, eval_every_steps=2)
    with pytest.raises(StoppedError, match="after step 4 of 6"):
        run.train(config=config, wish=lambda: next(wishes))
    assert committed_steps(Storage(tmp_path / "parts")) == [2, 4]
    again = Run(tmp_path / "parts", "a-2")
    assert again.progress.step == 4
    again.train()
    expected = weights_of(whole.policy)
    assert all(torch.equal(w, expected[n]) for n, w in weights_of(again.policy).items())
    assert timeless(again.checkpoints.metrics(STEPS)) == timeless(whole.reported)


def test_the_wait_for_data_and_the_memory_are_measured(tmp_path: Path) -> None:
    run = Run(tmp_path, "a-1")
    slow = (time.sleep(0.05 * (share.step == 1)) or share for share in rank_steps(1, 0))
    train(run.policy, run.optimizer, slow, {}, PLAN, CONFIG, run.checkpoints, run.progress, run.reported.append)
    waits = [row["data_wait_seconds"] for row in run.reported]
    assert waits[1] >= 0.05 > waits[3]
    assert all(0.05 < row["memory_gib"] < 64 for row in run.reported)
