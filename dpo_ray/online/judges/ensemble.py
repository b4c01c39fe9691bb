"""Several judges combined into one: the weighted mean of their ranks within a prompt, and how far they agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from .protocol import Judge, Question, Usage, Verdict

Scores = Sequence[float | None]


class JudgeByEnsemble:
    """A judge that asks its members one after the other; each has its own memory and costs."""

    def __init__(self, members: Mapping[str, tuple[Judge, float]]) -> None:
        """Store the members by name, each with its weight."""
        self._members = members

    @property
    def usage(self) -> Usage:
        return sum((judge.usage for judge, _ in self._members.values()), Usage())

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield the combined verdicts of all members. Raises JudgeError if a member does."""
        *earlier, last = self._members
        verdicts = {name: dict(self._members[name][0].judge(questions)) for name in earlier}
        weights = {name: weight for name, (_, weight) in self._members.items()}
        for number, verdict in self._members[last][0].judge(questions):
            yield number, combined({**{name: verdicts[name][number] for name in earlier}, last: verdict}, weights)

    def close(self) -> None:
        for judge, _ in self._members.values():
            judge.close()


def combined(verdicts: Mapping[str, Verdict], weights: Mapping[str, float]) -> Verdict:
    """Combine the members' verdicts on one question into one.

    A completion's score is the weighted mean of its ranks (`ranks`) from those members that rank it; None if none does.
    `members` holds the members' own scores; `concordance` defines `agreement`.
    """
    ranked = {name: ranks(v.scores) for name, v in verdicts.items()}
    scores = []
    for places in zip(*ranked.values(), strict=True):
        weighted = [(weights[name], place) for name, place in zip(ranked, places, strict=True) if place is not None]
        scores.append(sum(w * p for w, p in weighted) / sum(w for w, _ in weighted) if weighted else None)
    reasons = [f"{name}: {v.reason or 'has nothing to rank'}" for name, v in verdicts.items() if None in ranked[name]]
    return Verdict(
        tuple(scores),
        agreement=concordance({name: v.scores for name, v in verdicts.items()}, weights),
        reason="; ".join(reasons) if None in scores else "",
        members={name: v.scores for name, v in verdicts.items()},
    )


def ranks(scores: Scores) -> list[float | None]:
    """Convert scores to ranks from 0, the worst, to 1, the best; equal scores share the mean of their ranks.

    Missing scores stay missing and take no rank; a single score has nothing to be ranked against, and is missing too.
    """
    present = [s for s in scores if s is not None]
    if len(present) < 2:
        return [None] * len(scores)
    steps = 2 * (len(present) - 1)
    return [
        None if s is None else (sum(o < s for o in present) + sum(o <= s for o in present) - 1) / steps for s in scores
    ]


def concordance(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> float:
    """Return how far members agree on the order, 0 to 1: (1 + Kendall's tau) / 2 if nothing is tied or missing.

    Each two members, weighted by the product of their weights, and each two completions that both members score count 1
    if both order them alike or both call them equal, 0 if they order them in opposite ways, and 1/2 if only one calls
    them equal. The result is the mean of these; it is 1 if no two members score the same two completions, because then
    nobody contradicts.
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
