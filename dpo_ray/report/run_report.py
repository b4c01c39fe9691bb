"""Building of a run's report, only from the artifacts that the run has committed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.tables import read_table
from dpo_ray.config.train import BestConfig, LoraConfig
from dpo_ray.reference import audit_record
from dpo_ray.reference.granule import REASONS
from dpo_ray.reference.stage import QUARANTINE_FILE
from dpo_ray.run.context import recipe_yaml
from dpo_ray.run.offline import Finished
from dpo_ray.run.planning import Plan

from .data_report import data_page
from .reference_page import Check, ReferencePage, Scoring, UnscoredRow
from .run_page import ReportData, Tile

DECODED_SAMPLES = 3  # groups that the report shows as the model sees them
EXAMPLES = 3  # per reason why groups have no log-probs
SCORING = ("engines", "sequences", "found", "tokens", "cached_tokens", "tokens_per_second", "rescored")


def report_data(run: Finished, compared: Sequence[tuple[str, str, str]], paths: Mapping[str, str]) -> ReportData:
    """Gather what the report shows, only from committed artifacts, so that it can be written again at any time."""
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
        what=f"{recipe.train.objective.type} preference optimisation of {recipe.model.path}{_adapted(recipe.train.lora)} "
        f"on {rows['train/admitted']:,} preference groups, {trained['steps']:,} steps "
        f"with {recipe.train.workers} worker{'s' if recipe.train.workers > 1 else ''}",
        headline=_headline(rows, trained, evaluated),
        comparison=compared,
        train_metrics=[{k: v for k, v in m.items() if not k.startswith("eval_")} for m in metrics],
        eval_metrics=evaluations,
        best_step=best_step(recipe.train.best, evaluations),
        heldout_rewards={"chosen": heldout.get("reward_chosen", []), "rejected": heldout.get("reward_rejected", [])},
        kl_per_sample=[s["kl"] for s in samples],
        data=data_page(run.plan, run.prepare, DECODED_SAMPLES),
        reference=reference_page(run.plan, run.reference, trained["audit"] or {})
        if run.reference
        else ReferencePage(
            note=f"The objective `{recipe.train.objective.type}` needs no reference: nothing was scored."
        ),
        samples=[{k: v for k, v in s.items() if k != "kl"} for s in samples[: recipe.evaluate.shown_samples]],
        stages=[_stage(a) for a in (run.prepare, run.reference, run.schedule, run.train, run.evaluate) if a],
        recipe_yaml=recipe_yaml(recipe),
        versions=run.train.manifest.versions,
        paths=paths,
    )


def best_step(best: BestConfig | None, evaluations: Sequence[Mapping[str, float]]) -> int | None:
    """Return the step of the best evaluation, whose weights were kept. None: the last step's weights were kept."""
    known = [e for e in evaluations if best is not None and best.metric in e]
    if best is None or not known:
        return None
    sign = 1 if best.mode == "max" else -1
    return int(max(known, key=lambda e: sign * e[best.metric])["step"])


def _adapted(lora: LoraConfig | None) -> str:
    return "" if lora is None else f" by a LoRA adapter of rank {lora.rank}{', merged' if lora.merge else ''},"


def reference_page(plan: Plan, reference: Artifact, measured: Mapping[str, Any]) -> ReferencePage:
    """Gather what the section on the reference model shows. The limits of the audit come from the current recipe."""
    figures, n = reference.manifest.figures, plan.numerics
    parallel = f", {n.tensor_parallel} GPUs each" if n.tensor_parallel > 1 else ""
    judgement = audit_record.judged(measured, plan.recipe, plan.hardware.dtype) if measured else None
    goes_on = "" if judgement is None or judgement.passed else "Training continued, as the recipe sets on_drift: warn."
    return ReferencePage(
        scoring=Scoring(
            engine=n.version if n.engine == "vllm" else "the trainer",
            numerics=f"{n.dtype}, {n.device}{parallel}",
            **{name: figures[name] for name in SCORING},
        ),
        note=f"The recipe names vllm, but its audit failed ({plan.drift}): the trainer scored all groups again."
        if plan.drift
        else "",
        unscored=_unscored(reference),
        checks=[Check(f.name, f.value, f.limit, f.verdict, f.meaning) for f in judgement.findings] if judgement else (),
        passed=judgement is not None and judgement.passed,
        measured=measured,
        audit_note=goes_on if judgement else "Not audited: reference.audit.groups is 0.",
    )


def _unscored(reference: Artifact) -> list[UnscoredRow]:
    if QUARANTINE_FILE not in reference.names():
        return []
    table = read_table(reference, QUARANTINE_FILE, ["reason", "detail"])
    by_reason: dict[str, list[str]] = {}
    for reason, detail in zip(table["reason"].to_pylist(), table["detail"].to_pylist(), strict=True):
        by_reason.setdefault(reason, []).append(detail)
    return [UnscoredRow(r, REASONS[r], len(details), details[:EXAMPLES]) for r, details in sorted(by_reason.items())]


def _headline(rows: dict[str, int], trained: dict[str, Any], evaluated: dict[str, Any]) -> list[Tile]:
    heldout, sampled = evaluated.get("heldout", {}), evaluated.get("samples", {})
    tiles = [Tile("final loss", trained["final"].get("loss", float("nan")), f"step {trained['steps']:,}")]
    if "rewards/accuracies" in heldout:
        tiles.append(
            Tile(
                "held-out accuracy",
                f"{heldout['rewards/accuracies']:.1%}",
                f"± {heldout['accuracy_standard_error']:.1%}, {heldout['pairs']:.0f} pairs",
            )
        )
    if "rewards/margins" in heldout:
        of = "chosen minus rejected" if "pairs" in heldout else "desirable minus undesirable"
        tiles.append(Tile("held-out margin", f"{heldout['rewards/margins']:+.3f}", f"reward of {of}"))
    if "policy_true_reward" in sampled:
        tiles.append(
            Tile(
                "true reward",
                f"{sampled['reference_true_reward']:+.2f} → {sampled['policy_true_reward']:+.2f}",
                "reference → policy",
            )
        )
    if sampled:
        tiles.append(Tile("KL", f"{sampled['kl']:.2f}", "nats per completion, to the reference"))
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
        unscored = sum(count for name, count in manifest.rows.items() if name.endswith("/unscored"))
        note = f"{f['sequences']:,} sequences scored, {f['found']:,} already known"
        note += f"; {unscored:,} groups could not be scored" if unscored else ""
    return {
        "stage": manifest.stage,
        "key": manifest.key,
        "state": "committed",
        "seconds": manifest.seconds,
        "rows": manifest.rows.get(rows, 0),
        "note": note,
    }
