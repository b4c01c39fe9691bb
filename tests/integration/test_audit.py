"""A reference store that holds wrong values under the right keys, and what each `on_drift` makes of it, on real workers.

The store is filled before the run, so no engine ever starts; what fills it is the trainer's own forward pass, shifted.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dpo_ray.artifacts.places import artifact_store, reference_root
from dpo_ray.artifacts.tables import read_table
from dpo_ray.config.recipe import Recipe
from dpo_ray.errors import AuditError
from dpo_ray.models.load import model_directory
from dpo_ray.observe.progress import Reporter
from dpo_ray.reference.scorer import ScoreRequest, ScorerSettings
from dpo_ray.reference.stage import token_parts
from dpo_ray.reference.store.store import ReferenceStore
from dpo_ray.reference.trainer_scorer import TrainerScorer
from dpo_ray.report import summary
from dpo_ray.run import offline
from dpo_ray.run.planning import make_plan
from tests.integration.conftest import small_recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")
SHIFT_NATS = 0.01  # a token, downwards: a hundred times the limit on the mean in float32


def recipe(output: Path, on_drift: str, *overrides: str) -> Recipe:
    return small_recipe(output, f"reference.audit.on_drift={on_drift}", "train.steps=3", *overrides)


@pytest.fixture(scope="module")
def shifted(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an output in which the data is prepared and the engine's store holds every completion with shifted log-probs."""
    output = tmp_path_factory.mktemp("shifted")
    plan, tokens = offline.prepared(recipe(output, "stop"), Reporter())
    assert plan.numerics.engine == "vllm"
    store = ReferenceStore(reference_root(plan.recipe), plan.model_digest, plan.numerics)
    settings = ScorerSettings(
        "trainer", str(model_directory(plan.recipe.model)), "float32", "cpu", 128, 4096, 0.5, True
    )
    scorer = TrainerScorer(settings)
    for name in token_parts(tokens):
        table = read_table(tokens, name)
        requests = [
            ScoreRequest(g, np.array(row["prompt_ids"], np.int32), np.array(ids, np.int32))
            for g, row in enumerate(table.select(["prompt_ids", "completion_ids"]).to_pylist())
            for ids in row["completion_ids"]
        ]
        values = [logps for logps in scorer.score(requests) if logps is not None]
        assert len(values) == len(requests)
        store.append(store.keys(table), [v - np.float32(SHIFT_NATS) for v in values])
    return output


@pytest.fixture
def output(shifted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shifted, tmp_path / "runs"))


def said(run: Callable[[Reporter], object]) -> str:
    screen = io.StringIO()
    run(Reporter(Console(file=screen, width=400)))
    return screen.getvalue()


def first_loss(finished: offline.Finished) -> float:
    return json.loads(finished.train.read_bytes("metrics.jsonl").splitlines()[0])["loss"]


@pytest.mark.slow
def test_stop_names_the_fault_and_trains_nothing_and_warn_trains_and_says_so(output: Path) -> None:
    stop, warn = recipe(output, "stop"), recipe(output, "warn")
    with pytest.raises(AuditError) as raised:
        offline.offline(stop, Reporter())
    words = str(raised.value)
    assert "mean_token_drift 0.01, over 0.0001" in words
    assert "signed_bias -0.01, over 5e-05" in words
    assert "length_correlation -1" in words  # every error is the shift times the difference in length
    assert "groups that drift most: " in words
    assert "on_drift=use_trainer" in words
    assert "compared: 32 groups, 32 pairs" in words
    assert not list(output.glob("small/checkpoints/**/step-*"))
    assert not list(output.glob("artifacts/train-*"))
    assert {s: p.state for s, p in make_plan(stop).stages.items()} == {
        "prepare": "done",
        "reference": "done",
        "schedule": "done",
        "train": "missing",
        "evaluate": "missing",
    }

    results: list[tuple[offline.Finished, bool]] = []
    printed = said(lambda reporter: results.append(offline.offline(warn, reporter)))
    finished, ran = results[0]
    assert ran
    assert "mean_token_drift 0.01 over 0.0001" in printed
    assert "on_drift is warn, so training continues" in printed
    assert finished.reference.manifest.figures["sequences"] == 0
    assert finished.train.manifest.figures["steps"] == 3
    audit = finished.train.manifest.figures["audit"]
    assert audit["passed"] is False
    assert audit["signed_bias"] == pytest.approx(-SHIFT_NATS, rel=1e-3)
    assert audit["length_correlation"] == pytest.approx(-1, abs=1e-3)
    assert abs(first_loss(finished) - math.log(2)) > 1e-5  # the fault is felt: longer completions were rewarded
    html = Path(summary.write_report(finished)).read_text(encoding="utf-8")
    assert "over its limits" in html
    assert "Training continued, as the recipe sets on_drift: warn." in html
    assert " audit=drifted " in summary.line(summary.figures(finished))

    # The policy is there, and is not what a recipe asks for that stops; nothing is trained to say that.
    assert "it was trained although its audit failed" in make_plan(stop).stages["train"].reason
    with pytest.raises(AuditError, match=r"mean_token_drift 0\.01, over 0.0001"):
        offline.offline(stop, Reporter())
    assert make_plan(warn).done

    # And with what is known by now, use_trainer needs no audit to know who scores.
    plan = make_plan(recipe(output, "use_trainer"))
    assert (plan.numerics.engine, plan.stages["reference"].state) == ("trainer", "stale")


@pytest.mark.long
def test_use_trainer_scores_all_again_and_is_then_done(output: Path, files_of) -> None:
    use_trainer = recipe(output, "use_trainer", "train.workers=2")
    results: list[tuple[offline.Finished, bool]] = []
    printed = said(lambda reporter: results.append(offline.offline(use_trainer, reporter)))
    finished, ran = results[0]
    assert ran
    assert "mean_token_drift 0.01, over 0.0001" in printed
    assert "the trainer scores all groups again" in printed
    assert finished.plan.numerics.engine == "trainer"
    assert finished.reference.manifest.figures["found"] == 0  # no value of the engine's is among them
    assert finished.reference.manifest.figures["sequences"] == 2 * (96 + 24)
    audit = finished.train.manifest.figures["audit"]
    assert audit["passed"] is True
    assert first_loss(finished) == pytest.approx(math.log(2), abs=1e-6)
    assert len([p for p in (output / "reference-store").iterdir() if p.is_dir()]) == 2  # the two are kept apart
    html = Path(summary.write_report(finished)).read_text(encoding="utf-8")
    assert "The recipe names vllm, but its audit failed" in html
    assert " audit=trainer " in summary.line(summary.figures(finished))

    before = files_of(output)
    again, ran = offline.offline(use_trainer, Reporter())
    assert not ran
    assert files_of(output) == before
    assert again.train.key == finished.train.key
    assert "the audit of the engine's log-probs failed" in make_plan(use_trainer).stages["reference"].reason
    records = list(artifact_store(use_trainer).manifests("audit"))
    assert len(records) == 1
    assert records[0].figures["signed_bias"] == pytest.approx(-SHIFT_NATS, rel=1e-3)
