"""Whole runs of objectives that learn from something else than a pair and its reference: labels, rankings, likelihood."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from dpo_ray.artifacts.tables import read_table
from dpo_ray.observe.progress import Reporter
from dpo_ray.report import summary
from dpo_ray.run.offline import Finished, offline
from dpo_ray.run.planning import make_plan
from tests.integration.conftest import small_recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")
KTO = ("train.objective={type: kto, beta: 0.3}",)
ALL_IN_EACH = ("train.groups_per_step=48", "train.steps=6")  # so that the losses of steps can be compared
WORDS = [
    "the",
    "film",
    "was",
    "a",
    "great",
    "warm",
    "funny",
    "dull",
    "slow",
    "bad",
    "story",
    "with",
    "cast",
    "and",
    "plot",
]


def text(rng: random.Random, words: int) -> str:
    return " " + " ".join(rng.choice(WORDS) for _ in range(words))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def unpaired_rows(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [
        {"prompt": text(rng, 4), "completion": text(rng, rng.randint(2, 9)), "label": i % 3 > 0} for i in range(count)
    ]


def ranked_rows(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "prompt": text(rng, 4),
            "completions": [text(rng, rng.randint(2, 9)) for _ in range(3)],
            "scores": rng.sample(range(10), 3),
        }
        for _ in range(count)
    ]


def run(output: Path, *overrides: str) -> Finished:
    finished, _ = offline(small_recipe(output, *overrides), Reporter())
    return finished


def metrics(finished: Finished) -> list[dict[str, float]]:
    return [json.loads(line) for line in finished.train.read_bytes("metrics.jsonl").splitlines()]


@pytest.mark.slow
def test_kto_on_labelled_completions(tmp_path: Path) -> None:
    """From a file of single completions: z0 comes from others' completions, which the reference has scored too."""
    train, held = (write(tmp_path / f"{n}.jsonl", unpaired_rows(*how)) for n, how in (("a", (48, 0)), ("b", (16, 1))))
    data = f"data={{train: {train}, eval: {held}, chat_template: plain, max_length_tokens: 128}}"
    finished = run(tmp_path / "runs", data, *KTO, "train.workers=2", *ALL_IN_EACH)
    rows = metrics(finished)
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards/margins"] == pytest.approx(rows[-1]["rewards/chosen"] - rows[-1]["rewards/rejected"])
    assert "rewards/accuracies" not in rows[0]
    assert finished.reference.manifest.figures["sequences"] == 2 * (48 + 16)
    table = read_table(finished.prepare, finished.prepare.names("train/")[0])
    assert all(len(scores) == 2 and math.isnan(scores[1]) for scores in table["scores"].to_pylist())
    assert "evaluation" not in summary.figures(finished)
    assert "held-out" in Path(summary.write_report(finished)).read_text()


@pytest.mark.long
def test_kto_on_pairs_and_dpo_on_the_same_data_share_tokens_and_scores(tmp_path: Path) -> None:
    run(tmp_path)
    finished = run(tmp_path, *KTO)
    figures = finished.reference.manifest.figures
    assert figures["found"] >= 2 * (96 + 24)
    assert figures["sequences"] <= 96 + 24  # the completions under other prompts alone
    assert metrics(finished)[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert "rewards/accuracies" in metrics(finished)[0]


@pytest.mark.parametrize(
    "kind", [pytest.param("orpo", marks=pytest.mark.slow), pytest.param("simpo", marks=pytest.mark.long)]
)
def test_without_a_reference_nothing_is_scored(tmp_path: Path, kind: str) -> None:
    recipe = small_recipe(tmp_path, f"train.objective={{type: {kind}}}")
    assert "reference" not in make_plan(recipe).stages
    finished = run(tmp_path, f"train.objective={{type: {kind}}}")
    assert finished.reference is None
    assert not (tmp_path / "reference-store").exists()
    rows = metrics(finished)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "logratio" not in rows[0]
    assert finished.plan.done is False
    assert make_plan(recipe).done
    assert "needs no reference" in Path(summary.write_report(finished)).read_text()


@pytest.mark.long
def test_listwise_on_rankings(tmp_path: Path) -> None:
    """At step 0 all orders of three are equally likely: the loss is ln 6."""
    train, held = (write(tmp_path / f"{n}.jsonl", ranked_rows(*how)) for n, how in (("a", (48, 0)), ("b", (12, 1))))
    data = (
        f"data={{train: {train}, eval: {held}, chat_template: plain, max_length_tokens: 128, pairing: {{pairs: list}}}}"
    )
    finished = run(tmp_path / "runs", data, "train.objective={type: listwise, beta: 0.3}", *ALL_IN_EACH)
    rows = metrics(finished)
    assert rows[0]["loss"] == pytest.approx(math.log(6), abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"]
