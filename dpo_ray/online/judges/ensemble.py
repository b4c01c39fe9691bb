"""An ensemble: a judge that combines several judges (members). Its scores are weighted means of the members' ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from .protocol import Judge, Question, Usage, Verdict

Scores = Sequence[float | None]


class JudgeByEnsemble:
    """A judge that asks its members one after the other. Each member has its own stored answers and costs."""

    def __init__(self, members: Mapping[str, tuple[Judge, float]]) -> None:
        """Create the ensemble. `members` maps the name of each member to its judge and its weight."""
        self._members = members

    @property
    def usage(self) -> Usage:
        return sum((judge.usage for judge, _ in self._members.values()), Usage())

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield the index and the combined verdict of each question (a prompt with its completions).

        Raises:
            JudgeError: a member cannot work.
        """
        *earlier, last = self._members
        verdicts = {name: dict(self._members[name][0].judge(questions)) for name in earlier}
        weights = {name: weight for name, (_, weight) in self._members.items()}
        for number, verdict in self._members[last][0].judge(questions):
            yield number, combined({**{name: verdicts[name][number] for name in earlier}, last: verdict}, weights)

    def close(self) -> None:
        for judge, _ in self._members.values():
            judge.close()


def combined(verdicts: Mapping[str, Verdict], weights: Mapping[str, float]) -> Verdict:
    """Combine the verdicts of all members on the completions of one prompt into one verdict.

    The score of a completion is the weighted mean of the ranks (see `ranks`) that members give it. A member that gives
    no rank is ignored; if no member gives a rank, the score is None. In the verdict, `agreement` is the result
    of `concordance`, and `members` holds the scores that each member gave.
    """
    ranked = {name: ranks(v.scores) for name, v in verdicts.items()}
    scores = []
    for places in zip(*ranked.values(), strict=True):
        weighted = [(weights[name], place) for name, place in zip(ranked, places, strict=True) if place is not None]
        scores.append(sum(w * p for w, p in weighted) / sum(w for w, _ in weighted) if weighted else None)
    reasons = [f"{name}: {v.reason or 'fewer than two scores'}" for name, v in verdicts.items() if None in ranked[name]]
    return Verdict(
        tuple(scores),
        agreement=concordance({name: v.scores for name, v in verdicts.items()}, weights),
        reason="; ".join(reasons) if None in scores else "",
        members={name: v.scores for name, v in verdicts.items()},
    )


def ranks(scores: Scores) -> list[float | None]:
    """Convert scores to ranks from 0 (worst) to 1 (best). Equal scores all get the mean of their ranks.

    A missing score (None) gets the rank None. If there is only one score, it cannot be ranked, and all ranks are None.
    """
    present = [s for s in scores if s is not None]
    if len(present) < 2:
        return [None] * len(scores)
    steps = 2 * (len(present) - 1)
    return [
        None if s is None else (sum(o < s for o in present) + sum(o <= s for o in present) - 1) / steps for s in scores
    ]


def concordance(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> float:
    """Return how far the members agree on the order of the completions, from 0 to 1.

    Every two members are compared on every two completions that both members have scored. Such a comparison counts
    - 1 if both members put the completions in the same order, or both give them equal scores;
    - 1/2 if only one member gives them equal scores;
    - 0 if the members put them in opposite orders.
    The result is the weighted mean of all comparisons. The weight of a comparison is the product of the two members'
    weights. Without any comparison the result is 1, because nobody contradicts. With two members, and no equal or
    missing scores, the result is (1 + Kendall's tau) / 2.
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
