"""Definitions of the curves in a run's report: which metrics they show, in which panels, with which texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dpo_ray.config.data import EVAL

Colour = Literal["train", "eval", "chosen", "rejected", "prompt"]
COLOURS: tuple[Colour, ...] = ("train", "eval", "chosen", "rejected", "prompt")  # for `_named` curves


@dataclass(frozen=True)
class Line:
    """One line of a plot: a metric over the steps of training."""

    label: str
    metric: str
    colour: Colour
    set_by_recipe: bool = False  # not a noisy measurement, so never averaged

    @property
    def held_out(self) -> bool:
        return self.metric.startswith(f"{EVAL}_")


@dataclass(frozen=True)
class Panel:
    """One panel of a plot: lines that share a y axis."""

    y_label: str
    lines: tuple[Line, ...]
    bounds: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Curve:
    """One plot of the report, with one or more panels below each other. Without data, the text `instead` is shown."""

    key: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    instead: str = "Not measured"


def _both(label: str, metric: str, bounds: tuple[float | None, float | None] = (None, None)) -> Panel:
    """Return a panel with two lines: a metric of the training data, and the same metric of the held-out data."""
    return Panel(label, (Line("training", metric, "train"), Line("held out", f"{EVAL}_{metric}", "eval")), bounds)


REWARD = "reward = beta × (policy logp − reference logp), or beta × policy logp where the objective has no reference"
_ALWAYS = (
    Curve(
        "loss",
        "Loss",
        "Mean objective over the step's groups. Sigmoid DPO starts at ln 2 = 0.693.",
        (_both("loss", "loss"),),
    ),
    Curve(
        "margins",
        "Reward margin",
        f"margin = chosen reward − rejected reward; {REWARD}.",
        (_both("margin", "rewards/margins"),),
    ),
    Curve(
        "accuracy",
        "Preference accuracy",
        "Share of pairs whose chosen reward is the higher one.",
        (_both("accuracy", "rewards/accuracies", (0.0, 1.0)),),
    ),
    Curve(
        "rewards",
        "Chosen and rejected rewards",
        f"{REWARD}, mean over the step's completions. Of data without pairs, desirable counts as chosen.",
        (
            Panel(
                "reward",
                (
                    Line("chosen", "rewards/chosen", "chosen"),
                    Line("rejected", "rewards/rejected", "rejected"),
                    Line("chosen, held out", f"{EVAL}_rewards/chosen", "chosen"),
                    Line("rejected, held out", f"{EVAL}_rewards/rejected", "rejected"),
                ),
            ),
        ),
    ),
    Curve(
        "logps",
        "Policy log-probs",
        "logp = sum over a completion's tokens of log p(token), in nats.",
        (
            Panel(
                "logp (nats)",
                (Line("chosen", "logps/chosen", "chosen"), Line("rejected", "logps/rejected", "rejected")),
            ),
        ),
    ),
    Curve(
        "gradient",
        "Gradient norm and learning rate",
        "Global L2 norm of the gradient before clipping.",
        (
            Panel("grad norm", (Line("gradient norm", "grad_norm", "train"),), (0.0, None)),
            Panel("learning rate", (Line("learning rate", "learning_rate", "eval", True),), (0.0, None)),
        ),
    ),
    Curve(
        "throughput",
        "Throughput",
        "Tokens of all workers together per second of wall time.",
        (
            Panel("tokens / s", (Line("tokens per second", "tokens_per_second", "train"),), (0.0, None)),
            Panel("s / step", (Line("seconds per step", "seconds_per_step", "eval"),), (0.0, None)),
        ),
    ),
)
_WHERE_MEASURED = (
    Curve(
        "divergence",
        "Distance from the reference",
        "Log-ratio of policy and reference on the data's completions (nats per completion); its size (nats per token).",
        (
            _both("log-ratio", "logratio"),
            Panel("per token", (Line("size per token", "reference_drift", "prompt"),), (0.0, None)),
        ),
    ),
    Curve(
        "kl-estimate",
        "KL estimate of the objective",
        "Mean log-ratio of other prompts' completions, before it is cut off at 0: KTO's reference point, in nats.",
        (_both("KL (nats)", "kl"),),
    ),
    Curve(
        "entropy",
        "Entropy of the policy",
        "Mean over completion tokens of the entropy of the next token, in nats.",
        (_both("entropy (nats)", "entropy", (0.0, None)),),
    ),
    Curve(
        "length-bias",
        "Length bias of the margin",
        "Correlation of a pair's reward margin with how much longer its chosen completion is, within a step.",
        (_both("correlation", "length_bias"),),
    ),
    Curve(
        "use",
        "Use of the hardware",
        "Useful operations (10¹²) per second of a worker; tokens not computed, by sharing prompts and by not padding.",
        (
            Panel("TFLOP / s", (Line("operations per second", "tflops", "train"),), (0.0, None)),
            Panel(
                "share saved",
                (
                    Line("by sharing prompts", "sharing_saved", "chosen"),
                    Line("by not padding", "padding_saved", "prompt"),
                ),
                (0.0, 1.0),
            ),
        ),
    ),
    Curve(
        "mfu",
        "Model FLOPs utilisation",
        "Share of what the device can do in bf16 that goes into useful operations.",
        (Panel("MFU", (Line("utilisation", "mfu", "train"),), (0.0, 1.0)),),
    ),
    Curve(
        "waiting",
        "Waiting for data, and memory",
        "Seconds of a step that the trainer waits for its data; peak memory of a worker.",
        (
            Panel("wait (s)", (Line("waiting for data", "data_wait_seconds", "rejected"),), (0.0, None)),
            Panel("GiB", (Line("memory", "memory_gib", "train"),), (0.0, None)),
        ),
    ),
)


def curves(train: Sequence[Mapping[str, float]], held_out: Sequence[Mapping[str, float]]) -> list[Curve]:
    """List the curves in the report of a run.

    Some curves are in every report; the other curves are listed only if their metrics were measured.
    """
    names = {name for row in (*train, *held_out) for name, value in row.items() if value is not None}
    trained = bool(names & {"loss"})
    always = [
        Curve(c.key, c.title, c.caption, c.panels, "The data has no pairs to compare")
        if c.key == "accuracy" and trained
        else c
        for c in _ALWAYS
    ]
    return [*always, *(c for c in (*_WHERE_MEASURED, *_named(names)) if _metrics(c) & names)]


def _metrics(curve: Curve) -> set[str]:
    return {line.metric for panel in curve.panels for line in panel.lines}


def _named(names: Iterable[str]) -> list[Curve]:
    """Build the curves with one line for each source of the data, held-out set, or part of the model.

    `names` are the names of all metrics of the run; a name shows which source, set or part the metric belongs to.
    """
    after = {
        p: sorted(n.removeprefix(p) for n in names if n.startswith(p)) for p in ("rewards/accuracies/", "grad_norm/")
    }
    sources, parts = after.values()
    sets = sorted(
        n.removeprefix(f"{EVAL}_").removesuffix("_loss")
        for n in names
        if n.startswith(f"{EVAL}_") and n.endswith("_loss")
    )
    return [
        _curve("accuracy-by-source", "Preference accuracy by source", "As above, of each source of the data.", "accuracy",
               sources, "rewards/accuracies/{}", (0.0, 1.0)),
        _curve("gradient-by-part", "Gradient norm by part", "L2 norm before clipping, of each part of the model.", "grad norm",
               parts, "grad_norm/{}", (0.0, None)),
        _curve("loss-by-set", "Loss by held-out set", "Mean objective over each set.", "loss", sets, "eval_{}_loss"),
        _curve("accuracy-by-set", "Preference accuracy by held-out set", "Share of pairs whose chosen reward is the higher one.",
               "accuracy", sets, "eval_{}_rewards/accuracies", (0.0, 1.0)),
    ]  # fmt: skip


def _curve(
    key: str,
    title: str,
    caption: str,
    y_label: str,
    labels: Sequence[str],
    metric: str,
    bounds: tuple[float | None, float | None] = (None, None),
) -> Curve:
    """Return a curve with one line for each label, as long as there are colours; the caption names the other labels.

    `metric` is a format string whose placeholder `{}` is filled with the label.
    """
    lines = tuple(Line(n, metric.format(n), colour) for n, colour in zip(labels, COLOURS, strict=False))
    left = labels[len(lines) :]
    more = f" Not drawn: {', '.join(left[:10])}{' …' if len(left) > 10 else ''}." if left else ""
    return Curve(key, title, caption + more, (Panel(y_label, lines, bounds),))
