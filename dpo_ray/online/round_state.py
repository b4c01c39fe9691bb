"""The state of the rounds and the next action: derived from what is committed, and stored nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Literal

from dpo_ray.errors import ArtifactError

Stage = Literal["sample", "judge", "pair", "reference", "schedule", "train", "evaluate", "promote"]

STAGES: tuple[Stage, ...] = ("sample", "judge", "pair", "reference", "schedule", "train", "evaluate", "promote")
"""The stages of a round, in the order in which they are committed."""


class State(StrEnum):
    """The progress of a round: the last stage that it has reached, or its outcome."""

    PLANNED = "planned"
    SAMPLED = "sampled"
    JUDGED = "judged"
    PAIRED = "paired"
    REFERENCED = "referenced"
    TRAINED = "trained"
    EVALUATED = "evaluated"
    PROMOTED = "promoted"
    REJECTED = "rejected"

    @property
    def decided(self) -> bool:
        return self in (State.PROMOTED, State.REJECTED)


REACHED_BY: dict[Stage, State] = {
    "sample": State.SAMPLED,
    "judge": State.JUDGED,
    "pair": State.PAIRED,
    "reference": State.REFERENCED,
    "train": State.TRAINED,
    "evaluate": State.EVALUATED,
}
"""The state that a stage's artifact leads to. A schedule leads to none: it is rebuilt from its inputs at no cost."""


@dataclass(frozen=True)
class Committed:
    """The artifacts that one round has."""

    number: int  # of the round; the first is 1
    stages: frozenset[Stage] = frozenset()
    promoted: bool | None = None  # what the artifact of `promote` says; None: there is none

    def __post_init__(self) -> None:
        if ("promote" in self.stages) != (self.promoted is not None):
            raise ValueError("a decision and the artifact of `promote` must come together")


@dataclass(frozen=True)
class RunStage:
    """The next action: to run this stage of this round."""

    number: int
    stage: Stage


@dataclass(frozen=True)
class Done:
    """The next action when nothing is left to run."""

    decided_rounds: int
    reason: str


Action = RunStage | Done


def stages_of_round(uses_reference: bool) -> tuple[Stage, ...]:
    """List the stages that a round runs, in order."""
    return STAGES if uses_reference else tuple(s for s in STAGES if s != "reference")


def state_of(committed: Committed, uses_reference: bool = True) -> State:
    """Return how far a round has come.

    Args:
        uses_reference: whether the objective uses a reference; otherwise the round has no stage `reference`.

    Raises:
        ArtifactError: a stage is committed although an earlier one is not, or although the objective does not have it.
    """
    order = stages_of_round(uses_reference)
    _check_order(committed, order)
    if committed.promoted is not None:
        return State.PROMOTED if committed.promoted else State.REJECTED
    reached = [REACHED_BY[s] for s in order if s in committed.stages and s in REACHED_BY]
    return reached[-1] if reached else State.PLANNED


def next_action(
    rounds: Sequence[Committed], wanted_rounds: int, stop: str | None = None, uses_reference: bool = True
) -> Action:
    """Return which stage to run next, or why none is left.

    Args:
        rounds: from the first; rounds without any artifact may be left out.
        stop: why the decided rounds are the last (`promotion.stop_reason`). A round that has begun stays as it is.

    Raises:
        ArtifactError: what is committed contradicts the order of the stages, or a round began before the previous one
            was decided.
    """
    states = [state_of(r, uses_reference) for r in rounds]
    for (earlier, before), (later, state) in pairwise(zip(rounds, states, strict=True)):
        if state != State.PLANNED and not before.decided:
            raise ArtifactError(
                f"a skipped state: it has artifacts, but round {earlier.number} is {before} and not decided",
                where=f"round {later.number}",
                fix=f"restore the missing artifacts of round {earlier.number}; or delete those of round {later.number}",
            )
    decided = sum(s.decided for s in states)
    if stop is not None:
        return Done(decided, stop)
    if decided >= wanted_rounds:
        return Done(decided, f"all online.rounds={wanted_rounds} rounds have run")
    begun = rounds[decided].stages if decided < len(rounds) else frozenset()
    return RunStage(decided + 1, next(s for s in stages_of_round(uses_reference) if s not in begun))


def starting_policy(rounds: Sequence[Committed], number: int) -> int | None:
    """Return the round whose policy round `number` starts from: the last promoted before. None: the initial model."""
    return max((r.number for r in rounds if r.number < number and r.promoted), default=None)


def _check_order(committed: Committed, order: Sequence[Stage]) -> None:
    where = f"round {committed.number}"
    if strange := committed.stages - {*order}:
        raise ArtifactError(
            f"it has an artifact of `{min(strange)}`, a stage that its objective does not have",
            where=where,
            fix="look up the round's artifacts by this recipe's own keys",
        )
    missing = next((k for k, s in enumerate(order) if s not in committed.stages), len(order))
    if later := [s for s in order[missing:] if s in committed.stages]:
        listed = " and ".join(f"`{s}`" for s in later)
        raise ArtifactError(
            f"a skipped state: `{later[0]}` is committed, but `{order[missing]}` before it is not",
            where=where,
            fix=f"restore the artifact of `{order[missing]}`; or delete that of {listed} and run again: all are then rebuilt",
        )
