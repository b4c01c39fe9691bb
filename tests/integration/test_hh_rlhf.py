"""pipelines/hh_rlhf.yaml on real data: every row accounted for, and a policy that two engines read alike.

The data and the model are not part of the project: HH_DATA and HH_MODEL (defaults beside the repository) say where they are.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_ray.artifacts.tables import read_table
from dpo_ray.config.load import load_recipe
from dpo_ray.observe.progress import Reporter
from dpo_ray.run.offline import offline
from tests.helpers.vllm_logps import vllm_logps

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("HH_DATA", REPOSITORY.parent / "shared" / "data" / "hh-harmless"))
MODEL = Path(os.environ.get("HH_MODEL", REPOSITORY.parent / "shared" / "models" / "llama-6m"))
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (DATA.is_dir() and MODEL.is_dir()), reason=f"no HH-RLHF data in {DATA}, or no model in {MODEL}"
    ),
    pytest.mark.usefixtures("ray_cluster"),
]


def test_the_recipe_on_real_data(tmp_path: Path) -> None:
    overrides = [
        f"output={tmp_path}",
        f"model.path={MODEL}",
        f"data.train={DATA}/train-*.jsonl.gz",
        f"data.eval={DATA}/eval-*.jsonl.gz",
        "train.steps=6",
        "train.eval_every_steps=null",
        "evaluate.sample_prompts=8",
    ]
    run, _ = offline(load_recipe(REPOSITORY / "pipelines" / "hh_rlhf.yaml", overrides), Reporter())
    rows = run.prepare.manifest.rows
    assert rows["train/rows_in"] == 1600
    assert sum(rows[f"train/{what}"] for what in ("admitted", "quarantined", "duplicates")) == 1600
    assert rows["train/admitted"] > 1590
    assert run.train.manifest.figures["audit"]["passed"]
    assert run.train.manifest.figures["audit"]["max_token_drift"] < 1e-4

    policy = run.train.local_dir("policy", tmp_path / "cache")
    sample = read_table(run.prepare, run.prepare.names("eval/")[0]).slice(0, 12).to_pylist()
    pairs = [(row["prompt_ids"], completion) for row in sample for completion in row["completion_ids"]]
    prompts, completions = zip(*pairs, strict=True)
    by_vllm = vllm_logps(policy, 1024, prompts, completions, tmp_path / "store")
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    for (prompt, completion), expected in zip(pairs, by_vllm, strict=True):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
        total = float(logps[at, torch.tensor(completion)].double().sum())
        assert total == pytest.approx(expected, abs=1e-4 * len(completion))
