"""What a finished run came to: the line of figures, the table for a person, and the report's data."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_ray import planning
from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.data.admission import REASONS
from dpo_ray.data.stage import quarantine_examples
from dpo_ray.data.tokens import read_table
from dpo_ray.observe.report import ReportData, Tile, render_report
from dpo_ray.pipeline import Finished, recipe_yaml

REPORT = "report.html"
LENGTH_SAMPLE = 20_000  # groups whose lengths the report draws


def figures(run: Finished) -> dict[str, Any]:
    """Collect the figures of the last line that `dpo-ray run` prints."""
    rows, trained, evaluated = run.prepare.manifest.rows, run.train.manifest.figures, run.evaluate.manifest.figures
    heldout = evaluated.get("heldout", {})
    return {
        "rows_in": rows["train/rows_in"],
        "admitted": rows["train/admitted"],
        "quarantined": rows["train/quarantined"],
        "duplicates": rows["train/duplicates"],
        "steps": trained["steps"],
        "final_loss": trained["final"].get("loss"),
        "heldout_accuracy": heldout.get("rewards/accuracies"),
        "report": planning.run_storage(run.plan.recipe).full_path(REPORT),
        "policy": run.train.storage.full_path(_policy_prefix(run.train)),
    }


def line(values: dict[str, Any]) -> str:
    """Write the figures as one line of key=value."""
    return " ".join(f"{k}={_plain(v)}" for k, v in values.items())


def _plain(value: Any) -> str:
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _policy_prefix(trained: Artifact) -> str:
    return trained.entry("policy/config.json").path.rsplit("/", 1)[0]


def print_comparison(run: Finished, console: Console) -> None:
    """Print what changed from the reference to the policy, as a table."""
    rows = comparison(run)
    if not rows:
        return
    table = Table(title=f"{run.plan.recipe.name}: what training changed", title_justify="left")
    for name, justify in (("", "left"), ("reference", "right"), ("policy", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def comparison(run: Finished) -> list[tuple[str, str, str]]:
    """List (measure, reference, policy) in words that need no training."""
    sampled, heldout = (
        run.evaluate.manifest.figures.get("samples", {}),
        run.evaluate.manifest.figures.get("heldout", {}),
    )
    rows: list[tuple[str, str, str]] = []
    if "policy_true_reward" in sampled:
        rows.append(
            (
                "true reward of sampled completions",
                f"{sampled['reference_true_reward']:+.2f}",
                f"{sampled['policy_true_reward']:+.2f}",
            )
        )
        gain, error = sampled["true_reward_gain"], sampled["true_reward_gain_standard_error"]
        rows.append(
            (
                "  gain (in the reference's standard deviations)",
                "",
                f"{gain:+.2f} ± {error:.2f} ({sampled['true_reward_gain_in_sd']:+.1f} sd)",
            )
        )
    if heldout:
        rows.append(
            (
                "held-out pairs whose better completion is preferred",
                "",
                f"{heldout['rewards/accuracies']:.1%} ± {heldout['accuracy_standard_error']:.1%}",
            )
        )
        rows.append(("  what preferring the longer one would get", f"{heldout['longer_wins']:.1%}", ""))
        rows.append(("held-out reward margin", "0", f"{heldout['rewards/margins']:+.3f}"))
    if sampled:
        rows.append(
            (
                "distance from the reference (KL, nats a completion)",
                "0",
                f"{sampled['kl']:.2f} ± {sampled['kl_standard_error']:.2f}",
            )
        )
        rows.append(
            ("tokens of a sampled completion", f"{sampled['reference_tokens']:.1f}", f"{sampled['policy_tokens']:.1f}")
        )
        rows.append(
            (
                "completions that end by themselves",
                f"{sampled['reference_ended']:.0%}",
                f"{sampled['policy_ended']:.0%}",
            )
        )
    return rows


def write_report(run: Finished) -> str:
    """Write report.html into the run's directory, unless it says the same already, and return its place."""
    place = planning.run_storage(run.plan.recipe)
    page = render_report(report_data(run)).encode("utf-8", "replace")
    if not (place.exists(REPORT) and place.read_bytes(REPORT) == page):
        place.write(REPORT, page)
    return place.full_path(REPORT)


def report_data(run: Finished) -> ReportData:
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
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.evaluate.manifest.created_unix_seconds)),
        what=f"{recipe.train.objective.type} preference optimisation of {recipe.model.path} "
        f"on {rows['train/admitted']:,} preference groups, {trained['steps']:,} steps "
        f"with {recipe.train.workers} worker{'s' if recipe.train.workers > 1 else ''}",
        headline=_headline(rows, trained, evaluated),
        comparison=comparison(run),
        train_metrics=[{k: v for k, v in m.items() if not k.startswith("eval_")} for m in metrics],
        eval_metrics=evaluations,
        heldout_rewards={"chosen": heldout.get("reward_chosen", []), "rejected": heldout.get("reward_rejected", [])},
        kl_per_sample=[s["kl"] for s in samples],
        lengths=_lengths(run.prepare),
        account=[
            {k: a[k] for k in ("source", "split", "rows_in", "admitted", "quarantined", "duplicates")}
            for a in run.prepare.manifest.figures["accounts"]
        ],
        reasons=_reasons(run.prepare),
        audit=trained["audit"] or {},
        audit_note="" if trained["audit"] else "reference.audit.groups is 0",
        samples=[{k: v for k, v in s.items() if k != "kl"} for s in samples[: recipe.evaluate.shown_samples]],
        stages=[_stage(a) for a in (run.prepare, run.reference, run.schedule, run.train, run.evaluate)],
        recipe_yaml=recipe_yaml(recipe),
        versions=run.train.manifest.versions,
        paths={k: str(v) for k, v in figures(run).items() if k in ("report", "policy")},
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


def _lengths(prepared: Artifact) -> dict[str, list[int]]:
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
    for name in prepared.names("train/"):
        if len(lengths["prompt"]) >= LENGTH_SAMPLE:
            break
        for row in read_table(prepared, name, ["prompt_ids", "completion_ids"]).to_pylist():
            lengths["prompt"].append(len(row["prompt_ids"]))
            lengths["chosen"].append(len(row["completion_ids"][0]))
            lengths["rejected"].append(len(row["completion_ids"][-1]))
    return lengths


def _reasons(prepared: Artifact) -> list[dict[str, Any]]:
    counts: Counter[str] = Counter()
    for account in prepared.manifest.figures["accounts"]:
        counts.update(account["reasons"])
    examples = quarantine_examples(prepared)
    return [
        {"reason": reason, "meaning": REASONS[reason], "rows": count, "example": examples[reason][0]["sample"]}
        for reason, count in counts.most_common()
    ]


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
