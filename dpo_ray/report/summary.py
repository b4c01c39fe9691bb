"""Results of a finished run: the line of metrics for scripts, the table for people, and the report."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.places import run_storage
from dpo_ray.data.second_pass import left_out_by_rules
from dpo_ray.reference import audit_record
from dpo_ray.run.offline import Finished

from .run_page import render_report
from .run_report import report_data

REPORT = "report.html"


def figures(run: Finished) -> dict[str, Any]:
    """Return the metrics for the last line that `dpo-ray run` prints for an offline run."""
    rows, trained, evaluated = run.prepare.manifest.rows, run.train.manifest.figures, run.evaluate.manifest.figures
    scoring, left_out = (run.reference.manifest.figures, run.reference.manifest.rows) if run.reference else ({}, {})
    heldout = evaluated.get("heldout", {})
    by_rules = left_out_by_rules(run.prepare, "train")
    unscored = left_out.get("train/unscored", 0)  # admitted, but left out because the reference could not score them
    return {
        "rows_in": rows["train/rows_in"],
        "admitted": rows["train/admitted"] - unscored,
        "quarantined": rows["train/quarantined"] - by_rules + unscored,
        "left_out": by_rules,
        "duplicates": rows["train/duplicates"],
        "steps": trained["steps"],
        "final_loss": trained["final"].get("loss"),
        "heldout_accuracy": heldout.get("rewards/accuracies"),
        "scored": scoring.get("sequences", 0),
        "known": scoring.get("found", 0),
        "unscored": sum(count for name, count in left_out.items() if name.endswith("/unscored")),
        "audit": audit_in_a_word(run),
        "report": run_storage(run.plan.recipe).full_path(REPORT),
        "policy": run.train.storage.full_path(_policy_prefix(run.train)),
    }


def audit_in_a_word(run: Finished) -> str:
    """Return the result of the audit in one word: passed, drifted, trainer or off.

    drifted: a limit was exceeded and training continued. trainer: the engine's log-probs exceeded a limit, so the
    trainer computed all log-probs again. off: there was no audit.
    """
    if run.plan.drift:
        return "trainer"
    if not (measured := run.train.manifest.figures["audit"]):
        return "off"
    return "passed" if audit_record.judged(measured, run.plan.recipe, run.plan.hardware.dtype).passed else "drifted"


def line(values: dict[str, Any]) -> str:
    """Return the metrics as one line of key=value, for scripts."""
    return " ".join(f"{k}={_plain(v)}" for k, v in values.items())


def _plain(value: Any) -> str:
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _policy_prefix(trained: Artifact) -> str:
    return trained.entry("policy/README.md").path.rsplit("/", 1)[0]


def print_comparison(run: Finished, console: Console) -> None:
    """Print a table that compares the policy with the reference model. Print nothing if nothing was measured."""
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
    """List rows of (measure, value of the reference model, value of the policy) in words that newcomers understand."""
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
    if "rewards/accuracies" in heldout:  # unpaired data has none
        rows.append(
            (
                "held-out pairs whose better completion is preferred",
                "",
                f"{heldout['rewards/accuracies']:.1%} ± {heldout['accuracy_standard_error']:.1%}",
            )
        )
        rows.append(("  accuracy of always preferring the longer one", f"{heldout['longer_wins']:.1%}", ""))
    if "rewards/margins" in heldout:
        rows.append(("held-out reward margin", "0", f"{heldout['rewards/margins']:+.3f}"))
    if sampled:
        rows.append(
            (
                "distance from the reference (KL, nats per completion)",
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
    """Write report.html into the run's directory, unless it is up to date, and return its path."""
    place = run_storage(run.plan.recipe)
    page = render_report(report_data(run, comparison(run), _paths(run))).encode("utf-8", "replace")
    if not (place.exists(REPORT) and place.read_bytes(REPORT) == page):
        place.write(REPORT, page)
    return place.full_path(REPORT)


def _paths(run: Finished) -> dict[str, str]:
    return {k: str(v) for k, v in figures(run).items() if k in ("report", "policy")}
