"""Made-up online rounds for tests of their page and of their table."""

from __future__ import annotations

import math
import random

from dpo_ray.report.rounds_page import Interval, RoundRow, RoundSample, RoundsPage

STAGES = ("sample", "judge", "pair", "reference", "schedule", "train", "evaluate", "promote")
_SECONDS = (61.5, 12.25, 0.5, 20.0, 0.25, 140.0, 33.0, 0.125)


def rounds_page(
    count: int = 7, *, text: str = "plain", true_reward: bool = True, under_way: bool = False
) -> RoundsPage:
    """Make a page of `count` decided rounds, every fourth of them rejected; `text` stands wherever text may be foreign.

    Args:
        under_way: one more round has been sampled and judged.
    """
    noise = random.Random(5)
    rows = [_decided(n, text, true_reward, noise) for n in range(1, count + 1)]
    if under_way:
        rows.append(
            RoundRow(
                number=count + 1,
                state="judged",
                starts_from=_start(count + 1),
                seconds={"sample": 60.0, "judge": 12.0},
                tokens={"sample": 80_000},
                judge_usage={"calls": 512, "retries": 0, "input_tokens": 90_000, "output_tokens": 600, "usd": 0.004},
            )
        )
    words = {"mean_tokens": 62.5, "distinct_2": 0.71, "entropy": 5.2, "truncated_fraction": 0.04}
    said = [(n, f"{text}: what round {n} says. " + "More of it. " * n, -0.5 + n / 8) for n in range(count + 1)]
    return RoundsPage(
        name="tiny-rounds" if text == "plain" else text,
        created="2025-01-02T03:04:05Z",
        what=text if text != "plain" else f"{count} rounds of sigmoid preference optimisation of a tiny model",
        rows=rows,
        initial={"kl": 0.0, "true_reward": -0.4375 if true_reward else None, **words},
        samples=[RoundSample(f"{text}: what is asked {i}?", tuple(said)) for i in range(2)],
        stopped="" if under_way else f"{text}: all online.rounds={count} rounds have run",
        recipe_yaml=f"online:\n  rounds: {count}\n  note: {text}\n",
    )


def _start(number: int) -> int | None:
    """Return the last promoted round before `number`."""
    return next((n for n in range(number - 1, 0, -1) if n % 4), None)


def _decided(number: int, text: str, true_reward: bool, noise: random.Random) -> RoundRow:
    rejected, gone = not number % 4, 14 * (1 - math.exp(-number / 8))
    reached = 1.9 * (1 - math.exp(-gone / 4)) - (0.5 if rejected else 0) + noise.gauss(0, 0.03)
    return RoundRow(
        number=number,
        state="rejected" if rejected else "promoted",
        decision="rejected" if rejected else "promoted",
        reasons=(f"{text}: the win rate is {'0.42, not' if rejected else '0.56,'} at least 0.5",),
        starts_from=_start(number),
        pairs=400 - 3 * number,
        dropped={"no_gap": 11 + number, "one_completion": 2},
        offline_pairs=32,
        earlier_pairs=8 * (number > 1),
        kl=gone + (1.5 if rejected else 0),
        true_reward=-0.4375 + reached if true_reward else None,
        win_rate_initial=_rate(0.5 + reached / 5),
        win_rate_previous=_rate(0.42 if rejected else 0.56),
        heldout_accuracy=0.6 + number / 200,
        mean_tokens=62.5 + 2.5 * number,
        distinct_2=0.71 - 0.012 * number,
        entropy=5.2 - 0.04 * number,
        truncated_fraction=0.04 + 0.004 * number,
        seconds=dict(zip(STAGES, (s * (1 + number / 20) for s in _SECONDS), strict=True)),
        tokens={"sample": 81_920 + 900 * number, "reference": 60_000, "train": 118_000 + 500 * number},
        judge_usage={"calls": 640, "retries": 3, "input_tokens": 120_000, "output_tokens": 900, "usd": 0.0625},
    )


def _rate(rate: float) -> Interval:
    return (rate, rate - 0.07, rate + 0.06)
