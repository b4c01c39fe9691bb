"""Where rounds stand: every state against every commit, and drivers that die, race and come back against the promises."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dpo_ray.config.online import StopConfig
from dpo_ray.errors import ArtifactError
from dpo_ray.online.promotion import DecidedRound, RoundFigures, stop_reason
from dpo_ray.online.round_state import STAGES, Committed, Done, RunStage, State, next_action, starting_policy, state_of

# For each state, by what is committed: the stage that may be committed next, and the state that this brings.
WITH_REFERENCE = {
    "": ("sample", "sampled"),
    "sample": ("judge", "judged"),
    "sample judge": ("pair", "paired"),
    "sample judge pair": ("reference", "referenced"),
    "sample judge pair reference": ("schedule", "referenced"),
    "sample judge pair reference schedule": ("train", "trained"),
    "sample judge pair reference schedule train": ("evaluate", "evaluated"),
    "sample judge pair reference schedule train evaluate": ("promote", "promoted"),
}
WITHOUT_REFERENCE = {
    "": ("sample", "sampled"),
    "sample": ("judge", "judged"),
    "sample judge": ("pair", "paired"),
    "sample judge pair": ("schedule", "paired"),
    "sample judge pair schedule": ("train", "trained"),
    "sample judge pair schedule train": ("evaluate", "evaluated"),
    "sample judge pair schedule train evaluate": ("promote", "promoted"),
}
ALL = "sample judge pair reference schedule train evaluate promote"


def with_stages(stages: str, number: int = 1, promoted: bool = True) -> Committed:
    listed = frozenset(stages.split())
    return Committed(number, listed, promoted if "promote" in listed else None)


def decided(number: int, promoted: bool) -> Committed:
    return with_stages(ALL, number, promoted)


@pytest.mark.parametrize(("uses_reference", "table"), [(True, WITH_REFERENCE), (False, WITHOUT_REFERENCE)])
def test_every_state_against_every_commit(uses_reference: bool, table: dict) -> None:
    assert state_of(Committed(1), uses_reference) == State.PLANNED
    for (before, (allowed, brings)), event in product(table.items(), STAGES):
        known = with_stages(before)
        after = with_stages(f"{before} {event}")
        if event == allowed:
            assert state_of(after, uses_reference) == brings
            assert next_action([known], 1, None, uses_reference) == RunStage(1, event)
        elif event in before.split():  # a second driver's commit of the same key
            assert state_of(after, uses_reference) == state_of(known, uses_reference)
        else:
            with pytest.raises(ArtifactError, match=r"round 1: .*(before it has none|has no such stage)"):
                state_of(after, uses_reference)


def test_a_decided_round_stays_decided() -> None:
    assert state_of(decided(1, True)) == State.PROMOTED
    assert state_of(decided(1, False)) == State.REJECTED
    with pytest.raises(ValueError, match="the artifact of `promote` exists"):
        Committed(1, frozenset(ALL.split()))
    with pytest.raises(ValueError, match="the artifact of `promote` exists"):
        Committed(1, frozenset({"sample"}), promoted=True)


def test_a_hole_is_named_with_what_to_do() -> None:
    with pytest.raises(ArtifactError) as caught:
        state_of(with_stages("sample judge reference schedule train", number=3))
    assert str(caught.value).startswith(
        "round 3: the stage `reference` has an artifact, but the stage `pair` before it has none"
    )
    assert (
        "restore the artifact of `pair`; or delete the artifacts of `reference` and `schedule` and `train`"
        in caught.value.fix
    )


def test_no_round_begins_before_the_last_is_decided() -> None:
    undecided = with_stages(ALL.removesuffix(" promote"), number=1)
    assert next_action([undecided], 2) == RunStage(1, "promote")
    assert next_action([undecided, Committed(2)], 2) == RunStage(1, "promote")
    with pytest.raises(ArtifactError, match=r"round 2: .* round 1 before it has no decision .*evaluated"):
        next_action([undecided, with_stages("sample", number=2)], 2)
    with pytest.raises(ArtifactError, match=r"round 3: .* round 2 before it has no decision .*planned"):
        next_action([decided(1, True), Committed(2), decided(3, True)], 3)


def test_what_ends_the_rounds() -> None:
    rounds = [decided(1, True), decided(2, False)]
    assert next_action(rounds, 2) == Done(2, "all online.rounds=2 rounds have run")
    assert next_action(rounds, 3) == RunStage(3, "sample")  # `rounds` was raised
    assert next_action(rounds, 3, "enough") == Done(2, "enough")
    assert next_action([*rounds, with_stages("sample", 3)], 3, "enough") == Done(2, "enough")
    assert next_action(rounds, 1) == Done(2, "all online.rounds=1 rounds have run")


def test_a_rejected_round_keeps_the_old_policy() -> None:
    rounds = [decided(1, False), decided(2, True), decided(3, False)]
    assert [starting_policy(rounds, n) for n in (1, 2, 3, 4)] == [None, None, 2, 2]


@dataclass(frozen=True)
class Made:
    """What a stage of a driver has made and not yet committed."""

    number: int
    stage: str
    inputs: tuple[tuple[int, str], ...]  # (round, stage) of what it read
    content: float | bool | None = None  # of evaluate: the figure; of promote: the decision


class Rounds(RuleBasedStateMachine):
    """Drivers over one artifact store. A commit is atomic and the first of a key stays; a crash forgets what was made."""

    @initialize(
        wanted=st.integers(1, 3),
        uses_reference=st.booleans(),
        stop_if=st.builds(
            StopConfig,
            rounds_without_gain=st.none() | st.integers(1, 3),
            target_win_rate=st.none() | st.just(0.9),
        ),
    )
    def begin(self, wanted: int, uses_reference: bool, stop_if: StopConfig) -> None:
        self.store: dict[tuple[int, str], Made] = {}
        self.uncommitted: list[Made] = []
        self.log: list[tuple[int, str]] = []  # keys in the order of their commits
        self.wanted, self.uses_reference, self.stop_if = wanted, uses_reference, stop_if

    def rounds(self) -> list[Committed]:
        found = []
        for number in range(1, self.wanted + 1):
            stages = frozenset(s for s in STAGES if (number, s) in self.store)
            found.append(Committed(number, stages, self.decision(number)))
        return found

    def decision(self, number: int) -> bool | None:
        promote = self.store.get((number, "promote"))
        return None if promote is None else bool(promote.content)

    def history(self) -> list[DecidedRound]:
        numbers = [n for n in range(1, self.wanted + 1) if self.decision(n) is not None]
        figures = [self.store[n, "evaluate"].content for n in numbers]
        return [
            DecidedRound(RoundFigures(win_rate_against_previous=f, win_rate_against_initial=f), bool(self.decision(n)))
            for n, f in zip(numbers, figures, strict=True)
        ]

    def stop(self) -> str | None:
        return stop_reason(self.history(), self.stop_if)

    def make(self, figure: float) -> Made | None:
        """Do what a driver does between two commits: look up, ask what is next, run it. Its inputs must be there."""
        rounds = self.rounds()
        action = next_action(rounds, self.wanted, self.stop(), self.uses_reference)
        if isinstance(action, Done):
            return None
        number, stage = action.number, action.stage
        begins_at = starting_policy(rounds, number)
        policy = () if begins_at is None else ((begins_at, "train"),)
        own = {
            "sample": (),
            "judge": ("sample",),
            "pair": ("sample", "judge"),
            "reference": ("pair",),
            "schedule": ("pair", "reference") if self.uses_reference else ("pair",),
            "train": ("schedule",),
            "evaluate": ("train",),
            "promote": ("evaluate",),
        }[stage]
        inputs = (*((number, s) for s in own), *(policy if stage in ("sample", "train", "evaluate") else ()))
        assert all(key in self.store for key in inputs)
        content = None
        if stage == "evaluate":
            content = figure  # a measurement: another driver's may differ
        elif stage == "promote":
            content = self.store[number, "evaluate"].content >= 0.5
        return Made(number, stage, inputs, content)

    def commit(self, made: Made) -> None:
        key = (made.number, made.stage)
        if (first := self.store.get(key)) is not None:
            assert made.inputs == first.inputs  # so the key of both is the same
            assert made.stage != "promote" or made.content == first.content
            return
        self.store[key] = made
        self.log.append(key)

    @rule(figure=st.floats(0.3, 1.0))
    def a_driver_runs_a_stage(self, figure: float) -> None:
        if (made := self.make(figure)) is not None:
            self.uncommitted.append(made)

    def taken(self, which: int) -> list[Made]:
        """Take one of what drivers have made; none where there is none."""
        return [self.uncommitted.pop(which % len(self.uncommitted))] if self.uncommitted else []

    @rule(which=st.integers(0, 9))
    def a_driver_commits(self, which: int) -> None:
        for made in self.taken(which):
            self.commit(made)

    @rule(which=st.integers(0, 9))
    def a_driver_dies_before_its_commit(self, which: int) -> None:
        self.taken(which)

    @rule(which=st.integers(0, 9))
    def a_driver_dies_after_its_commit_and_does_not_know(self, which: int) -> None:
        for made in self.taken(which):
            self.commit(made)
            self.uncommitted.append(made)

    @rule(stages=st.integers(1, 12), figure=st.floats(0.3, 1.0))
    def a_driver_works_on(self, stages: int, figure: float) -> None:
        for _ in range(stages):
            if (made := self.make(figure)) is not None:
                self.commit(made)

    @rule(more=st.integers(1, 2))
    def rounds_are_raised(self, more: int) -> None:
        self.wanted = min(self.wanted + more, 6)

    @invariant()
    def every_round_is_made_in_order_and_only_after_the_last(self) -> None:
        stages = [s for s in STAGES if self.uses_reference or s != "reference"]
        in_order = [(n, s) for n in range(1, self.wanted + 1) for s in stages]
        assert (
            self.log == in_order[: len(self.log)]
        )  # nothing is skipped, and nothing, a decision least of all, comes twice

    @invariant()
    def training_learns_from_this_rounds_judged_pairs_alone(self) -> None:
        for number, stage in self.log:
            if stage != "train":
                continue
            ancestors, todo = set(), [key for key in self.store[number, "train"].inputs if key[1] != "train"]
            while todo:
                key = todo.pop()
                ancestors.add(key)
                todo += [k for k in self.store[key].inputs if k[1] != "train"]
            needed = {"sample", "judge", "pair", "schedule"} | ({"reference"} if self.uses_reference else set())
            assert ancestors == {(number, s) for s in needed}

    @invariant()
    def a_round_starts_from_the_last_promoted_policy(self) -> None:
        policy: int | None = None
        for number in range(1, self.wanted + 1):
            for stage in ("sample", "train"):
                if (found := self.store.get((number, stage))) is not None:
                    assert [k[0] for k in found.inputs if k[1] == "train"] == ([] if policy is None else [policy])
            if self.decision(number):
                policy = number

    @invariant()
    def nothing_follows_a_stop(self) -> None:
        history = self.history()
        for count in range(1, len(history) + 1):
            if stop_reason(history[:count], self.stop_if) is not None:
                assert max(number for number, _ in self.log) == count


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


@pytest.mark.long
def test_a_thousand_sequences_of_events_and_crashes() -> None:
    run_state_machine_as_test(Rounds, settings=settings(max_examples=1000, stateful_step_count=30, deadline=None))


def test_whoever_goes_on_to_the_end_comes_to_the_same() -> None:
    """Drivers that alternate stage by stage end where one that is never disturbed does."""
    machines = [Rounds(), Rounds()]
    for machine in machines:
        machine.begin(3, True, StopConfig())
    while (made := machines[0].make(0.6)) is not None:
        machines[0].commit(made)
    while (first := machines[1].make(0.6)) is not None:
        second = machines[1].make(0.7)
        assert second is not None
        machines[1].commit(first)
        machines[1].commit(second)
    assert machines[0].store == machines[1].store
    assert len(machines[0].log) == 3 * len(STAGES)
