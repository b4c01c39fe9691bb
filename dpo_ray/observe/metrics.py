"""The table of all metrics that a run exports to Prometheus: names, kinds, labels and descriptions.

Names follow Prometheus' conventions: base units, `_ratio` for shares from 0 to 1, `_total` for counters. Ray adds the
prefix `ray_` to the names, and labels such as WorkerId. `recorder.py` adds the label `run` to every metric.

There are no histograms, because Ray computes their sums from the middle of each bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXPORT_PREFIX = "ray_"


@dataclass(frozen=True)
class Metric:
    """One metric. `labels` are those besides `run`.

    If `column` is given, the values are those of that column of metrics.jsonl, multiplied by `factor`.
    """

    name: str
    kind: Literal["gauge", "counter"]
    description: str
    labels: tuple[str, ...] = ()
    column: str = ""
    factor: float = 1.0

    @property
    def exported_name(self) -> str:
        """Return the name under which Prometheus knows this metric."""
        return EXPORT_PREFIX + self.name


def _gauge(name: str, description: str, *labels: str) -> Metric:
    return Metric(f"dpo_ray_{name}", "gauge", description, labels)


def _counter(name: str, description: str, *labels: str) -> Metric:
    return Metric(f"dpo_ray_{name}_total", "counter", description, labels)


def _column(column: str, name: str, description: str, factor: float = 1.0) -> Metric:
    return Metric(f"dpo_ray_{name}", "gauge", description, column=column, factor=factor)


# ---- the run

STAGE_ACTIVE = _gauge("stage_active", "1 while the stage runs, 0 after it", "stage")
RUN_FAILURES = _counter(
    "run_failures", "Errors that ended a driver of this run; SIGTERM and Ctrl-C do not count", "error"
)
LEASE_HELD = _gauge("lease_held", "1 while this driver holds the run, 0 after another driver has taken it over")
LEASE_TOKEN = _gauge("lease_token", "Number of the lease: how often a driver has taken this run")
OUTPUT_FREE = _gauge(
    "output_free_bytes", "Free bytes of the file system with the run's directory; not for object stores"
)
OUTPUT_SIZE = _gauge("output_size_bytes", "Size of the file system with the run's directory; not for object stores")

# ---- prepare and reference

DATA_ROWS = _gauge(
    "data_rows", "Input rows by outcome: admitted, quarantined, left_out (by a rule), duplicate", "split", "outcome"
)
REFERENCE_GROUPS = _gauge(
    "reference_groups", "Groups whose reference log-probs are done, or waiting (the queue)", "state"
)
REFERENCE_COMPLETIONS = _counter(
    "reference_completions", "Completions whose reference log-probs came from the store or from an engine", "source"
)
REFERENCE_TOKENS = _counter("reference_tokens", "Tokens scored with the reference model, with their prompts")
REFERENCE_SECONDS = _counter("reference_compute_seconds", "Computing time of scoring, summed over all engines")
REFERENCE_LEFT_OUT = _counter("reference_left_out_groups", "Groups that no engine could score")
ENGINES = _gauge("engines", "Engines of the pool by state: starting (or waiting for resources), idle, busy", "state")
ENGINE_DEATHS = _counter("engine_deaths", "Engines that died, by what they did: start, work", "during")
SAMPLED_TOKENS = _counter("sampled_tokens", "Tokens that engines sampled")
AUDIT_DRIFT = _gauge(
    "audit_token_drift_nats", "Audit before step 1: |stored - trainer's log-prob| of a token, mean or max", "statistic"
)
AUDIT_MARGIN_ERROR = _gauge(
    "audit_margin_error_nats", "Audit before step 1: standard deviation of a pair's margin error"
)
AUDIT_PASSED = _gauge("audit_passed", "1 if the audit is within its limits, else 0")

# ---- training

TRAIN_STARTS = _counter(
    "train_starts", "Starts of the group of training workers; each start after the first is a restart"
)
TRAIN_NOT_FINITE = _counter("train_not_finite", "Steps whose loss or gradient was not finite; each one ends training")
TRAIN_PROGRESS_TIME = _gauge(
    "train_progress_timestamp_seconds",
    "Unix time of the last progress: the stage began, workers started, or a step ended",
)
TRAIN_STEPS_PLANNED = _gauge("train_planned_steps", "Steps that this training has in all")

ROW_METRICS = (
    _column("step", "train_step", "Last finished step"),
    _column("epoch", "train_epoch", "Epochs finished"),
    _column("num_tokens", "train_tokens", "Tokens trained on since step 1"),
    _column("loss", "train_loss", "Loss of the last step, as the objective defines it"),
    _column("rewards/margins", "train_reward_margin", "Mean reward of chosen minus rejected completions"),
    _column("rewards/accuracies", "train_reward_accuracy_ratio", "Share of pairs whose chosen completion has the higher reward"),
    _column("rewards/chosen", "train_reward_chosen", "Mean implicit reward of chosen completions"),
    _column("rewards/rejected", "train_reward_rejected", "Mean implicit reward of rejected completions"),
    _column("reference_drift", "train_reference_drift_nats", "Mean |policy - reference log-prob| of a token"),
    _column("entropy", "train_entropy_nats", "Entropy of the policy per token, where it is measured"),
    _column("grad_norm", "train_gradient_norm", "Norm of the gradient before clipping"),
    _column("learning_rate", "train_learning_rate", "Learning rate"),
    _column("seconds_per_step", "train_step_duration_seconds", "Duration of the last step"),
    _column("data_wait_seconds", "train_data_wait_seconds", "Time of the last step spent waiting for its data"),
    _column("tokens_per_second", "train_tokens_per_second", "Tokens per second over all workers"),
    _column("tflops", "train_flops_per_second", "Useful operations per second and worker", 1e12),
    _column("mfu", "train_mfu_ratio", "Model FLOPs utilization: the same as a share of the GPU's peak; known GPUs only"),
    _column("sharing_saved", "train_sharing_saved_ratio", "Share of tokens saved because completions share their prompt"),
    _column("padding_saved", "train_padding_saved_ratio", "Share of a padded batch's tokens that is saved by packing"),
    _column("memory_gib", "train_memory_peak_bytes", "Peak memory of rank 0: of its GPU, or of the process on CPU", 2.0**30),
    _column("eval_loss", "heldout_loss", "Loss on all held-out data"),
    _column("eval_rewards/margins", "heldout_reward_margin", "Mean reward margin on all held-out data"),
    _column("eval_rewards/accuracies", "heldout_reward_accuracy_ratio", "Accuracy on all held-out data"),
)  # fmt: skip
"""Metrics whose values are columns of metrics.jsonl. A column that a step did not measure keeps its last value."""

# ---- online rounds

ROUND = _gauge("round", "Number of the current round, from 1")
ROUNDS = _gauge(
    "rounds", "Rounds that have begun, by state: planned, sampled, ..., trained, evaluated, promoted, rejected", "state"
)
ROUND_WIN_RATE = _gauge(
    "round_win_rate_ratio",
    "Share of won comparisons of the last evaluated policy against the initial or previous one",
    "against",
)
ROUND_KL = _gauge("round_kl_nats", "KL divergence of the last evaluated policy from the initial one, per completion")
ROUND_REWARD = _gauge("round_true_reward", "True reward of the last evaluated policy, where the data defines one")

METRICS: tuple[Metric, ...] = (
    STAGE_ACTIVE, RUN_FAILURES, LEASE_HELD, LEASE_TOKEN, OUTPUT_FREE, OUTPUT_SIZE, DATA_ROWS,
    REFERENCE_GROUPS, REFERENCE_COMPLETIONS, REFERENCE_TOKENS, REFERENCE_SECONDS, REFERENCE_LEFT_OUT,
    ENGINES, ENGINE_DEATHS, SAMPLED_TOKENS, AUDIT_DRIFT, AUDIT_MARGIN_ERROR, AUDIT_PASSED,
    TRAIN_STARTS, TRAIN_NOT_FINITE, TRAIN_PROGRESS_TIME, TRAIN_STEPS_PLANNED, *ROW_METRICS,
    ROUND, ROUNDS, ROUND_WIN_RATE, ROUND_KL, ROUND_REWARD,
)  # fmt: skip


def markdown_table() -> str:
    """Return the table of all metrics for docs/metrics.md."""
    lines = ["| metric | kind | labels besides `run` | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        description = metric.description.replace("|", r"\|")
        lines.append(f"| `{metric.exported_name}` | {metric.kind} | {labels} | {description} |")
    return "\n".join(lines) + "\n"
