"""pipelines/hh_pandalm.yaml on real data: two formats as they are published, mixed 1:1, every row accounted for.

The data and the model are not part of the project: HH_DATA, PANDALM_DATA and HH_MODEL say where they are.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.artifacts.tables import read_table
from dpo_ray.config.load import load_recipe
from dpo_ray.observe.progress import Reporter
from dpo_ray.run.offline import offline

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"
HH = Path(os.environ.get("HH_DATA", SHARED / "data/hh-harmless"))
PANDALM = Path(os.environ.get("PANDALM_DATA", SHARED / "data/pandalm")) / "testset-v1.json.gz"
MODEL = Path(os.environ.get("HH_MODEL", SHARED / "models/llama-6m"))
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (HH.is_dir() and PANDALM.is_file() and MODEL.is_dir()), reason=f"no data in {HH}, {PANDALM}, or no {MODEL}"
    ),
    pytest.mark.usefixtures("ray_cluster"),
]


def test_two_published_formats_mixed_one_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # the recipe names its template from here
    overrides = [
        f"output={tmp_path}",
        f"model.path={MODEL}",
        f"data.train=[{{name: hh, path: '{HH}/train-*.jsonl.gz', weight: 1}}, {{name: pandalm, path: {PANDALM}, weight: 1}}]",
        f"data.eval.hh={HH}/eval-*.jsonl.gz",
        "train.steps=4",
        "train.eval_every_steps=2",
        "evaluate.sample_prompts=4",
    ]
    run, _ = offline(load_recipe(REPOSITORY / "pipelines/hh_pandalm.yaml", overrides), Reporter())
    rows = run.prepare.manifest.rows
    assert rows["train/rows_in"] == 1600 + 999
    assert rows["eval_hh/rows_in"] == 200
    for split in ("train", "eval_hh"):
        assert rows[f"{split}/rows_in"] == sum(rows[f"{split}/{w}"] for w in ("admitted", "quarantined", "duplicates"))
    admitted: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for account in run.prepare.manifest.figures["accounts"]:
        admitted[account["source"]] += account["admitted"]
        if account["source"] == "pandalm":
            reasons.update(account["reasons"])
    assert admitted["hh"] == admitted["pandalm"] > 500
    assert reasons["TIE"] == sum(_is_tie(row) for row in json.loads(gzip.decompress(PANDALM.read_bytes())))

    parts = [read_table(run.prepare, name) for name in run.prepare.names("train/")]
    soft = Counter(
        round(p, 3)
        for part in parts
        for p, source in zip(part["preference_probability"].to_pylist(), part["source"].to_pylist(), strict=True)
        if source == "pandalm"
    )
    assert set(soft) == {1.0, 0.833, 0.667}  # of three verdicts, a tie counts half for either
    assert run.train.manifest.figures["audit"]["max_token_drift"] < 1e-4
    assert "eval_hh_rewards/accuracies" in run.train.manifest.figures["final_evaluation"]


def _is_tie(row: dict[str, Any]) -> bool:
    """Return whether the verdicts are balanced. A row without two texts is a fault before this is asked."""
    texts = [row[f"response{i}"] for i in (1, 2)]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return False
    verdicts = [row[f"annotator{i}"] for i in (1, 2, 3)]
    return verdicts.count(1) == verdicts.count(2)
