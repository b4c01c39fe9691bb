"""The metrics of online rounds, recorded for Prometheus."""

from __future__ import annotations

from collections import Counter

from dpo_ray.observe.metrics import ROUND, ROUND_KL, ROUND_REWARD, ROUND_WIN_RATE, ROUNDS
from dpo_ray.observe.recorder import record

from .measure import round_figures
from .round_plan import Rounds
from .round_state import State, state_of


def record_rounds(rounds: Rounds) -> None:
    """Record the number of the current round, the states of all rounds, and the figures of the last evaluated one."""
    record(ROUND, len(rounds.rounds))
    states = Counter(state_of(r.committed, uses_reference=r.reference is not None) for r in rounds.rounds)
    for state in State:
        record(ROUNDS, states[state], state=state)
    evaluated = [r.artifacts["evaluate"] for r in rounds.rounds if "evaluate" in r.artifacts]
    if not evaluated:
        return
    figures = round_figures(evaluated[-1].manifest.figures)
    for metric, value, labels in (
        (ROUND_WIN_RATE, figures.win_rate_against_initial, {"against": "initial"}),
        (ROUND_WIN_RATE, figures.win_rate_against_previous, {"against": "previous"}),
        (ROUND_KL, figures.kl, {}),
        (ROUND_REWARD, figures.true_reward, {}),
    ):
        if value is not None:
            record(metric, value, **labels)
