"""Several judges as one: the weighted mean of their ranks within a prompt, and how far they agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from .protocol import Judge, Question, Usage, Verdict

Scores = Sequence[float | None]


class Ensemble:
    """Asks its members one after the other; each has its own memory and costs."""

    def __init__(self, members: Mapping[str, tuple[Judge, float]]) -> None:
        """Take the members by name, each with its weight."""
        self._members = members

    @property
    def usage(self) -> Usage:
        return sum((judge.usage for judge, _ in self._members.values()), Usage())

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield what all say together. Raises JudgeError where a member does."""
        *earlier, last = self._members
        said = {name: dict(self._members[name][0].judge(questions)) for name in earlier}
        weights = {name: weight for name, (_, weight) in self._members.items()}
        for number, verdict in self._members[last][0].judge(questions):
            yield number, combined({**{name: said[name][number] for name in earlier}, last: verdict}, weights)

    def close(self) -> None:
        for judge, _ in self._members.values():
            judge.close()


def combined(verdicts: Mapping[str, Verdict], weights: Mapping[str, float]) -> Verdict:
    """Make one verdict of the members' on one question.

    A completion's score is the weighted mean of its ranks (`ranks`) with those members that rank it; None where none does. For the
    members' own scores see `members`; for `agreement`, `concordance`.
    """
    ranked = {name: ranks(v.scores) for name, v in verdicts.items()}
    scores = []
    for places in zip(*ranked.values(), strict=True):
        told = [(weights[name], place) for name, place in zip(ranked, places, strict=True) if place is not None]
        scores.append(sum(w * p for w, p in told) / sum(w for w, _ in told) if told else None)
    reasons = [f"{name}: {v.reason or 'has nothing to rank'}" for name, v in verdicts.items() if None in ranked[name]]
    return Verdict(
        tuple(scores),
        agreement=concordance({name: v.scores for name, v in verdicts.items()}, weights),
        reason="; ".join(reasons) if None in scores else "",
        members={name: v.scores for name, v in verdicts.items()},
    )


def ranks(scores: Scores) -> list[float | None]:
    """Put scores in ranks from 0, the worst, to 1, the best; equal ones share the mean of their places.

    Missing scores stay missing and take no place; a single score has nothing to be ranked against, and is missing too.
    """
    present = [s for s in scores if s is not None]
    if len(present) < 2:
        return [None] * len(scores)
    steps = 2 * (len(present) - 1)
    return [
        None if s is None else (sum(o < s for o in present) + sum(o <= s for o in present) - 1) / steps for s in scores
    ]


def concordance(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> float:
    """Return how far members order the same way, 0 to 1: (1 + Kendall's tau) / 2 where nothing is tied or missing.

    Every two members, weighted by the product of their weights, and every two completions that both score, count 1 where both order
    them alike or both call them equal, 0 where they order them against each other, 1/2 where one of them calls them equal. The mean
    of these; 1 where no two members score the same two completions, for then nobody contradicts.
    """
    agreed = total = 0.0
    for a, b in combinations(scores, 2):
        both = [(x, y) for x, y in zip(scores[a], scores[b], strict=True) if x is not None and y is not None]
        for (x, y), (other_x, other_y) in combinations(both, 2):
            first, second = _sign(x - other_x), _sign(y - other_y)
            agreed += weights[a] * weights[b] * (1 - abs(first - second) / 2)
            total += weights[a] * weights[b]
    return agreed / total if total else 1.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
