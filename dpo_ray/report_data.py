"""The report of a run, gathered from its committed artifacts alone."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.account import data_page
from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.data.tokens import read_table
from dpo_ray.observe.report import ReportData, Tile
from dpo_ray.pipeline import Finished, recipe_yaml

DECODED_SAMPLES = 3  # groups that the report shows as the model sees them


def report_data(run: Finished, compared: Sequence[tuple[str, str, str]], paths: Mapping[str, str]) -> ReportData:
    """Gather the report from the committed artifacts alone, so that it can be written again at any time."""
    recipe, trained, evaluated = run.plan.recipe, run.train.manifest.figures, run.evaluate.manifest.figures
    metrics = [json.loads(text) for text in run.train.read_bytes("metrics.jsonl").splitlines()]
    evaluations = [
        {"step": m["step"], **{k: v for k, v in m.items() if k.startswith("eval_")}}
        for m in metrics
        if "eval_loss" in m
    ]
    if not evaluations and trained["final_evaluation"]:
        evaluations = [{"step": trained["steps"], **trained["final_evaluation"]}]
    samples = (
        [json.loads(text) for text in run.evaluate.read_bytes("samples.jsonl").splitlines()]
        if "samples.jsonl" in run.evaluate.names()
        else []
    )
    heldout = read_table(run.train, "heldout.parquet").to_pydict() if "heldout.parquet" in run.train.names() else {}
    rows = run.prepare.manifest.rows
    return ReportData(
        name=recipe.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.evaluate.manifest.created_unix_seconds)),
        what=f"{recipe.train.objective.type} preference optimisation of {recipe.model.path} "
        f"on {rows['train/admitted']:,} preference groups, {trained['steps']:,} steps "
        f"with {recipe.train.workers} worker{'s' if recipe.train.workers > 1 else ''}",
        headline=_headline(rows, trained, evaluated),
        comparison=compared,
        train_metrics=[{k: v for k, v in m.items() if not k.startswith("eval_")} for m in metrics],
        eval_metrics=evaluations,
        heldout_rewards={"chosen": heldout.get("reward_chosen", []), "rejected": heldout.get("reward_rejected", [])},
        kl_per_sample=[s["kl"] for s in samples],
        data=data_page(run.plan, run.prepare, DECODED_SAMPLES),
        audit=trained["audit"] or {},
        audit_note="" if trained["audit"] else "reference.audit.groups is 0",
        samples=[{k: v for k, v in s.items() if k != "kl"} for s in samples[: recipe.evaluate.shown_samples]],
        stages=[_stage(a) for a in (run.prepare, run.reference, run.schedule, run.train, run.evaluate)],
        recipe_yaml=recipe_yaml(recipe),
        versions=run.train.manifest.versions,
        paths=paths,
    )


def _headline(rows: dict[str, int], trained: dict[str, Any], evaluated: dict[str, Any]) -> list[Tile]:
    heldout, sampled = evaluated.get("heldout", {}), evaluated.get("samples", {})
    tiles = [Tile("final loss", trained["final"].get("loss", float("nan")), f"step {trained['steps']:,}")]
    if heldout:
        tiles.append(
            Tile(
                "held-out accuracy",
                f"{heldout['rewards/accuracies']:.1%}",
                f"± {heldout['accuracy_standard_error']:.1%}, {heldout['pairs']:.0f} pairs",
            )
        )
        tiles.append(Tile("held-out margin", f"{heldout['rewards/margins']:+.3f}", "reward of chosen minus rejected"))
    if "policy_true_reward" in sampled:
        tiles.append(
            Tile(
                "true reward",
                f"{sampled['reference_true_reward']:+.2f} → {sampled['policy_true_reward']:+.2f}",
                "reference → policy",
            )
        )
    if sampled:
        tiles.append(Tile("KL", f"{sampled['kl']:.2f}", "nats a completion, to the reference"))
    tiles.append(
        Tile(
            "rows",
            f"{rows['train/rows_in']:,}",
            f"{rows['train/admitted']:,} admitted, {rows['train/quarantined']:,} quarantined, {rows['train/duplicates']:,} duplicates",
        )
    )
    return tiles


def _stage(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    rows = {
        "prepare": "train/rows_in",
        "reference": "groups",
        "schedule": "train/steps",
        "train": "steps",
        "evaluate": "samples",
    }[manifest.stage]
    note = ""
    if manifest.stage == "reference":
        f = manifest.figures
        note = (
            f"{f['scored']:,} sequences scored, {f['found']:,} already known, "
            f"{f['cached_tokens']:,} of {f['tokens']:,} tokens from the prompt cache"
        )
    return {
        "stage": manifest.stage,
        "key": manifest.key,
        "state": "committed",
        "seconds": manifest.seconds,
        "rows": manifest.rows.get(rows, 0),
        "note": note,
    }
