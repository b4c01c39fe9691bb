"""The state of the rounds and the next action. Both are derived from the committed artifacts, and stored nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Literal

from dpo_ray.errors import ArtifactError

Stage = Literal["sample", "judge", "pair", "reference", "schedule", "train", "evaluate", "promote"]

STAGES: tuple[Stage, ...] = ("sample", "judge", "pair", "reference", "schedule", "train", "evaluate", "promote")
"""The stages of a round, in the order in which they run and commit their artifacts."""


class State(StrEnum):
    """The progress of a round: the last stage that is finished; or the decision, once there is one."""

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
"""The state of a round when a stage's artifact exists. The stage `schedule` has no state: repeating it costs little."""


@dataclass(frozen=True)
class Committed:
    """What is committed of one round: the stages that have an artifact, and whether the round's policy was promoted."""

    number: int  # of the round; the first round is 1
    stages: frozenset[Stage] = frozenset()
    promoted: bool | None = None  # the decision in the artifact of `promote`; None: there is no such artifact

    def __post_init__(self) -> None:
        if ("promote" in self.stages) != (self.promoted is not None):
            raise ValueError(
                "`promoted` is None although the artifact of `promote` exists, or is set although it does not"
            )


@dataclass(frozen=True)
class RunStage:
    """The next action is to run the stage `stage` of the round `number`."""

    number: int
    stage: Stage


@dataclass(frozen=True)
class Done:
    """There is no next action: all rounds have ended, for the reason `reason`."""

    decided_rounds: int
    reason: str


Action = RunStage | Done


def stages_of_round(uses_reference: bool) -> tuple[Stage, ...]:
    """List the stages of a round in order, without `reference` if the objective uses no reference."""
    return STAGES if uses_reference else tuple(s for s in STAGES if s != "reference")


def state_of(committed: Committed, uses_reference: bool = True) -> State:
    """Return the state of a round: how far it has come.

    Args:
        uses_reference: whether the objective uses a reference; otherwise the round has no stage `reference`.

    Raises:
        ArtifactError: a stage has an artifact although an earlier stage has none; or there is an artifact of
            `reference` although the objective uses no reference.
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
    """Return the stage to run next, or the reason why there is nothing left to run.

    Args:
        rounds: the rounds in order, beginning with the first. Rounds without artifacts may be left out at the end.
        wanted_rounds: number of rounds that the recipe asks for.
        stop: the reason to run no further round (`promotion.stop_reason`), or None. If there is a reason, a round that has
            begun is not continued either.

    Raises:
        ArtifactError: a stage has an artifact although an earlier stage has none; or a round has artifacts although the
            previous round has no decision.
    """
    states = [state_of(r, uses_reference) for r in rounds]
    for (earlier, before), (later, state) in pairwise(zip(rounds, states, strict=True)):
        if state != State.PLANNED and not before.decided:
            raise ArtifactError(
                f"this round has artifacts, but round {earlier.number} before it has no decision (its state is `{before}`)",
                where=f"round {later.number}",
                fix=f"restore the missing artifacts of round {earlier.number}; or delete the artifacts of round {later.number}",
            )
    decided = sum(s.decided for s in states)
    if stop is not None:
        return Done(decided, stop)
    if decided >= wanted_rounds:
        return Done(decided, f"all online.rounds={wanted_rounds} rounds have run")
    begun = rounds[decided].stages if decided < len(rounds) else frozenset()
    return RunStage(decided + 1, next(s for s in stages_of_round(uses_reference) if s not in begun))


def starting_policy(rounds: Sequence[Committed], number: int) -> int | None:
    """Return the number of the round from whose policy round `number` starts.

    This is the last round before `number` whose policy was promoted; None if there is none. Then round `number` starts
    from the initial model.
    """
    return max((r.number for r in rounds if r.number < number and r.promoted), default=None)


def _check_order(committed: Committed, order: Sequence[Stage]) -> None:
    where = f"round {committed.number}"
    if strange := committed.stages - {*order}:
        raise ArtifactError(
            f"this round has an artifact of `{min(strange)}`, but a round with this objective has no such stage",
            where=where,
            fix="use only the artifacts whose keys belong to this recipe",
        )
    missing = next((k for k, s in enumerate(order) if s not in committed.stages), len(order))
    if later := [s for s in order[missing:] if s in committed.stages]:
        listed = " and ".join(f"`{s}`" for s in later)
        raise ArtifactError(
            f"the stage `{later[0]}` has an artifact, but the stage `{order[missing]}` before it has none",
            where=where,
            fix=f"restore the artifact of `{order[missing]}`; or delete the artifacts of {listed} and run again to rebuild all",
        )
