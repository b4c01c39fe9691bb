"""The page of online rounds: the gain and cost of each round, and whether its policy was promoted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .page import format_number, format_seconds, format_signed, render_page
from .plots import Plot
from .rounds_plots import Outcome, Point, by_round_plot, frontier_plot, stacked_plot, stage_colours

SAMPLE_CHARACTERS = 1_200
MAX_SAMPLES = 12
_SHOWN_AT_EITHER_END = 3  # of each prompt, so many first and last rounds are shown; the rounds between are collapsed
_EVEN = 0.5  # the win rate of the initial policy against itself

Interval = tuple[float, float, float]
"""A rate, with the lower and the upper bound of its confidence interval."""


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """The metrics of one round. A metric is None if it was not measured, or not measured yet.

    number: the number of the round, from 1.
    starts_from: the number of the round whose policy this round starts from; None: the recipe's model.
    pairs: number of training pairs, of which `offline_pairs` are from the recipe's data and `earlier_pairs` from earlier
    rounds.
    dropped: number of prompts that gave no pair, by reason.
    kl: KL divergence from the initial policy, in nats per completion.
    entropy: entropy of the completions' tokens, in nats.
    seconds, tokens: time and tokens of each stage.
    judge_usage: `calls`, `retries`, `input_tokens`, `output_tokens`, `usd`.
    """

    number: int
    state: str
    decision: Literal["promoted", "rejected", ""] = ""
    reasons: tuple[str, ...] = ()
    starts_from: int | None = None
    pairs: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    offline_pairs: int = 0
    earlier_pairs: int = 0
    kl: float | None = None
    true_reward: float | None = None
    win_rate_initial: Interval | None = None
    win_rate_previous: Interval | None = None
    heldout_accuracy: float | None = None
    mean_tokens: float | None = None
    distinct_2: float | None = None
    entropy: float | None = None
    truncated_fraction: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    judge_usage: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float | None:
        return sum(self.seconds.values()) if self.seconds else None


@dataclass(frozen=True)
class RoundSample:
    """One prompt and its completions in all rounds, as (round, text, score). Round 0 is the initial policy."""

    prompt: str
    by_round: tuple[tuple[int, str, float | None], ...]


@dataclass(frozen=True, kw_only=True)
class RoundsPage:
    """Everything that the page of rounds shows. All text may come from untrusted data, so it is escaped; samples are cut.

    name, created, what: name of the run, its time (ISO 8601), and one sentence about it.
    initial: the measured metrics of the initial policy: `kl`, `true_reward`, `mean_tokens`, `distinct_2`, `entropy`,
    `truncated_fraction`.
    stopped: why the rounds ended; empty if they have not ended.
    """

    name: str
    created: str
    what: str
    rows: Sequence[RoundRow] = ()
    initial: Mapping[str, float | None] = field(default_factory=dict)
    samples: Sequence[RoundSample] = ()
    stopped: str = ""
    recipe_yaml: str = ""

    @property
    def policy(self) -> RoundRow | None:
        """Return the newest round whose policy was promoted, or None if no policy was promoted."""
        return next((row for row in reversed(self.rows) if row.decision == "promoted"), None)


def rounds_html(page: RoundsPage) -> str:
    """Return the page as HTML. The same data gives the same bytes."""
    return render_page(
        "rounds.html.jinja",
        kind="online rounds",
        name=page.name,
        created=page.created,
        what=page.what,
        page=page,
        headline=_headline(page),
        standing=_standing(page),
        gains=[_frontier(page), _steps(page)],
        has_true_reward=_has_true_reward(page),
        words=_words(page),
        costs=_costs(page),
        samples=[_cut_in_three(sample) for sample in page.samples[:MAX_SAMPLES]],
        sample_characters=SAMPLE_CHARACTERS,
        totals=_totals(page.rows),
        rate=rate_words,
        reward=reward_words,
        cost=cost_words,
    )


def rate_words(rate: Interval | None) -> str:
    """Format a rate with its confidence interval: 71.9 % (64.8–78.1)."""
    if rate is None or not all(map(math.isfinite, rate)):
        return "–"
    value, low, high = (100 * r for r in rate)
    return f"{value:.1f} % ({low:.1f}–{high:.1f})"


def reward_words(reward: float | None) -> str:
    """Format a reward with + or -, because a reward has no unit and no bounds."""
    return "–" if reward is None or not math.isfinite(reward) else format_signed(reward, 3)


def cost_words(usd: float | None) -> str:
    """Format an amount of money in US dollars. An amount above 0 is never shown as 0."""
    if usd is None:
        return "–"
    return "< $0.01" if 0 < usd < 0.005 else f"${usd:,.2f}"


def _outcome(row: RoundRow) -> Outcome:
    return row.decision or "undecided"


def _has_true_reward(page: RoundsPage) -> bool:
    return any(row.true_reward is not None for row in page.rows)


def _headline(page: RoundsPage) -> list[tuple[str, str | float, str]]:
    policy, decided = page.policy, [row for row in page.rows if row.decision]
    promoted = sum(row.decision == "promoted" for row in decided)
    tiles: list[tuple[str, str | float, str]] = []
    since = f"round {policy.number} against the initial policy" if policy else "no round is promoted"
    if _has_true_reward(page):
        before, after = (reward_words(v) for v in (page.initial.get("true_reward"), policy and policy.true_reward))
        note = f"initial policy → round {policy.number}" if policy else since
        tiles.append(("true reward", f"{before} → {after}" if policy else before, note))
    rate = policy.win_rate_initial if policy else None
    known = rate is not None and all(map(math.isfinite, rate))
    low_to_high = f"{100 * rate[1]:.1f}–{100 * rate[2]:.1f} %, " if rate and known else ""
    tiles.append(("win rate", f"{100 * rate[0]:.1f} %" if rate and known else "–", low_to_high + since))
    tiles.append(("KL", format_number(policy.kl if policy else None), "nats per completion, to the initial policy"))
    going = len(page.rows) - len(decided)
    tiles.append(
        (
            "rounds promoted",
            f"{promoted} of {len(decided)}",
            f"{len(decided) - promoted} rejected" + (f", {going} not decided" if going else ""),
        )
    )
    totals = _totals(page.rows)
    tiles.append(("pairs trained on", totals["pairs"], f"{totals['dropped']:,} prompts without a pair"))
    calls = f"{format_number(totals['calls'])} judge calls, {cost_words(totals['usd'])}" if totals["calls"] else ""
    tiles.append(("time", format_seconds(totals["seconds"]), calls))
    return tiles


def _standing(page: RoundsPage) -> str:
    """Describe in one sentence whether the rounds have ended, or what the last round is doing."""
    if page.stopped:
        return f"The rounds have ended: {page.stopped.rstrip('.')}."
    if not page.rows:
        return "No round has begun."
    last = page.rows[-1]
    return f"The rounds go on: round {last.number} is {last.state}."


def _frontier(page: RoundsPage) -> Plot:
    """Plot every policy by its KL divergence and its true reward or, if this is unknown, its win rate.

    Both the KL divergence and the win rate are measured against the initial policy.
    """
    by_reward = _has_true_reward(page)
    start = page.initial.get("true_reward") if by_reward else _EVEN
    points = [] if start is None else [Point(0, "initial", 0.0, start)]
    for row in page.rows:
        rate = row.win_rate_initial
        y, interval = (row.true_reward, None) if by_reward else (rate[0], rate[1:]) if rate else (None, None)
        if row.kl is not None and y is not None:
            points.append(Point(row.number, _outcome(row), row.kl, y, interval))
    return frontier_plot(points, "true reward" if by_reward else "win rate", None if by_reward else _EVEN)


def _steps(page: RoundsPage) -> Plot:
    """Plot the win rate of each round's policy against the policy that the round started from."""
    points = [
        Point(row.number, _outcome(row), row.number, row.win_rate_previous[0], row.win_rate_previous[1:])
        for row in page.rows
        if row.win_rate_previous
    ]
    caption = "Against the policy that the round started from, with confidence intervals. Dotted: neither is better."
    return by_round_plot("steps", "Win rate of each step", caption, "win rate", points, _EVEN)


def _words(page: RoundsPage) -> list[Plot]:
    """Plot the length and the diversity of completions by round. Round 0 is the initial policy."""
    shown = (
        ("mean_tokens", "Length", "Tokens of a completion on average.", "tokens"),
        ("distinct_2", "Distinct bigrams", "Different pairs of tokens among all; falls as a policy repeats itself.", "share"),
        ("entropy", "Entropy of the words", "Of a token drawn from all completions; falls as they collapse.", "nats"),
        ("truncated_fraction", "Cut off", "Share of completions that reached the token limit before they ended.", "share"),
    )  # fmt: skip
    plots = []
    for name, title, caption, unit in shown:
        first = page.initial.get(name)
        points = [] if first is None else [Point(0, "initial", 0, first)]
        rows = [(row, getattr(row, name)) for row in page.rows]
        points += [Point(row.number, _outcome(row), row.number, value) for row, value in rows if value is not None]
        plots.append(by_round_plot(name.replace("_", "-"), title, caption, unit, points))
    return plots


def _costs(page: RoundsPage) -> list[Plot]:
    """Plot the time and the tokens of each round, by stage."""
    longest = max((row.total_seconds or 0.0 for row in page.rows), default=0.0)
    unit, divisor = ("hours", 3600.0) if longest >= 7200 else ("minutes", 60.0) if longest >= 120 else ("seconds", 1.0)
    times = {row.number: {s: v / divisor for s, v in row.seconds.items()} for row in page.rows if row.seconds}
    tokens = {row.number: dict(row.tokens) for row in page.rows if row.tokens}
    colours = stage_colours(tokens, times)
    return [
        stacked_plot("time-by-stage", "Time by stage", "Wall time of each round's stages.", unit, times, colours,
                     lambda amount: format_seconds(amount * divisor)),
        stacked_plot("tokens-by-stage", "Tokens by stage", "Tokens that each stage sampled, scored or trained on.",
                     "tokens", tokens, colours, lambda amount: f"{format_number(amount)} tokens"),
    ]  # fmt: skip


def _cut_in_three(sample: RoundSample) -> dict[str, Any]:
    """Split the rounds of a prompt into the first, the middle and the last rounds; the page collapses the middle ones."""
    rounds, n = sample.by_round, _SHOWN_AT_EITHER_END
    folded = rounds[n:-n] if len(rounds) > 2 * n else ()
    first, last = (rounds[:n], rounds[-n:]) if folded else (rounds, ())
    return {"prompt": sample.prompt, "first": first, "folded": folded, "last": last}


def _totals(rows: Sequence[RoundRow]) -> dict[str, Any]:
    """Return the sums of metrics over all rounds. A sum is None if the metric was measured in no round."""

    def whole(values: list[float | None]) -> Any:
        known = [v for v in values if v is not None]
        return sum(known) if known else None

    usage = ("calls", "retries", "input_tokens", "output_tokens", "usd")
    return {
        "pairs": whole([row.pairs for row in rows]),
        "offline": sum(row.offline_pairs for row in rows),
        "earlier": sum(row.earlier_pairs for row in rows),
        "dropped": sum(sum(row.dropped.values()) for row in rows),
        "seconds": whole([row.total_seconds for row in rows]),
        **{name: whole([row.judge_usage.get(name) for row in rows]) for name in usage},
    }
