"""A judge that asks a language model at an OpenAI-compatible endpoint.

The model compares pairs of completions, each pair in both orders, or scores each completion.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from dpo_ray.artifacts.digest import digest
from dpo_ray.config.judge import LlmJudge
from dpo_ray.errors import JudgeError

from .llm_answers import Answer, PairAnswer, ScoreAnswer, pair_request, score_request
from .llm_endpoint import Endpoint, Trouble, Unanswered
from .llm_limits import Budget, Pace
from .protocol import Memory, Question, Spending, Usage, Verdict

FIRST_BACK_OFF_SECONDS, LONGEST_BACK_OFF_SECONDS = 0.5, 30.0
LONGEST_WAIT_SECONDS = 600.0  # if an endpoint asks for a longer wait, the judge gives up

Outcome = Answer | Unanswered
SWAPPED = {"first": "second", "second": "first", "tie": "tie"}
POINTS = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.5, 0.5)}


class JudgeByLlm:
    """A judge that asks a language model. Each answer is stored before it is used, and is never requested again."""

    def __init__(self, config: LlmJudge, memory: Memory, spending: Spending) -> None:
        """Prepare the calls; nothing is sent yet.

        Raises:
            ConfigError: the environment variable with the API key is missing or not usable.
        """
        self._config, self._memory = config, memory
        where = f"online.judge ({config.base_url}, model {config.model})"
        self._account = Budget(config, spending, where)
        self._endpoint = Endpoint(config, self._account, where)
        rate = config.requests_per_minute
        self._pace = Pace(rate / config.replicas if rate else None)

    @property
    def usage(self) -> Usage:
        return self._account.usage

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yield the index and the verdict of each question (a prompt with its completions).

        A verdict is yielded as soon as all calls for its question are answered.

        Raises:
            JudgeError: the endpoint refuses a request or does not respond, or `max_usd` is spent. Calls in flight are
                first finished, and their answers are stored.
        """
        with asyncio.Runner() as runner:
            asking = _Asking(self._config, self._endpoint, self._pace, self._account, self._memory)
            try:
                runner.run(asking.start(questions))
                while done := runner.run(asking.next()):
                    yield from done
            finally:
                runner.run(asking.stop())

    def close(self) -> None: ...


class _Asking:
    """All calls to the endpoint for one batch of questions, in one event loop."""

    def __init__(self, config: LlmJudge, endpoint: Endpoint, pace: Pace, account: Budget, memory: Memory) -> None:
        self._config, self._endpoint, self._pace, self._account, self._memory = config, endpoint, pace, account, memory
        self._client = endpoint.client()
        self._slots = asyncio.Semaphore(config.concurrency)
        self._calls: dict[str, asyncio.Task[Outcome]] = {}  # by the request's digest; equal requests share a call
        self._open: set[asyncio.Task[Any]] = set()  # requests in flight
        self._waiting: set[asyncio.Task[tuple[int, Verdict]]] = set()
        self._failure: JudgeError | None = None

    async def start(self, questions: Sequence[Question]) -> None:
        self._waiting = {asyncio.create_task(self._judged(n, q)) for n, q in enumerate(questions)}

    async def next(self) -> list[tuple[int, Verdict]]:
        """Wait until a verdict is ready; return all verdicts that are ready, or [] when all have been returned.

        Raises:
            JudgeError: a call of one of the questions failed.
        """
        if not self._waiting:
            return []
        done, self._waiting = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
        return [task.result() for task in done]

    async def stop(self) -> None:
        """Stop starting calls. Wait for the calls in flight and store their answers, because they must be paid for."""
        tasks = [*self._waiting, *self._calls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._open, return_exceptions=True)
        await self._client.aclose()

    async def _judged(self, number: int, question: Question) -> tuple[int, Verdict]:
        distinct = list(dict.fromkeys(question.completions))  # equal texts are equally good, and cost one call
        if self._config.mode == "pairwise":
            pairs = list(combinations(range(len(distinct)), 2))
            requests = [
                pair_request(self._config, question.prompt, distinct[first], distinct[second])
                for i, j in pairs
                for first, second in ((i, j), (j, i))
            ]
            outcomes = await asyncio.gather(*map(self._outcome, requests))
            verdict = by_pairs(
                len(distinct), dict(zip(pairs, zip(outcomes[::2], outcomes[1::2], strict=True), strict=True))
            )
        else:
            requests = [score_request(self._config, question.prompt, completion) for completion in distinct]
            verdict = by_scores(await asyncio.gather(*map(self._outcome, requests)))
        of_text = dict(zip(distinct, verdict.scores, strict=True))
        return number, Verdict(tuple(map(of_text.get, question.completions)), verdict.agreement, verdict.reason)

    async def _outcome(self, request: dict[str, Any]) -> Outcome:
        key = digest(request)
        if (known := self._memory.get(key)) is not None:
            return (PairAnswer if self._config.mode == "pairwise" else ScoreAnswer).model_validate(known)
        if key not in self._calls:
            self._calls[key] = asyncio.create_task(self._asked(key, request))
        return await self._calls[key]

    async def _asked(self, key: str, request: dict[str, Any]) -> Outcome:
        """Send a request until there is an answer, or until the retries are used up. Return the answer, or why there is none."""
        async with self._slots:  # the slot is also held during waits, so that an endpoint in trouble gets fewer calls
            try:
                return await self._tried(key, request)
            except JudgeError as error:
                self._failure = error
                raise

    async def _tried(self, key: str, request: dict[str, Any]) -> Outcome:
        for attempt in range(self._config.max_retries + 1):
            await asyncio.sleep(self._pace.reserve())
            if self._failure is not None:  # another call has ended the batch
                raise self._failure
            self._account.check()
            if attempt:
                self._account.retried()
            sent = asyncio.create_task(self._sent(key, request))
            self._open.add(sent)
            sent.add_done_callback(self._open.discard)
            outcome = await asyncio.shield(sent)
            if not isinstance(outcome, Trouble):
                return outcome
            last = attempt == self._config.max_retries
            if outcome.wait_seconds > LONGEST_WAIT_SECONDS or (last and not outcome.with_answer):
                raise self._endpoint.given_up(outcome, attempt)
            if last:
                return Unanswered(outcome.what)
            self._pace.hold(outcome.wait_seconds)
            await asyncio.sleep(0 if outcome.with_answer else outcome.wait_seconds + _back_off(attempt))
        raise AssertionError("unreachable: the last attempt always returns or raises")

    async def _sent(self, key: str, request: dict[str, Any]) -> Outcome | Trouble:
        outcome = await self._endpoint.call(self._client, request)
        if isinstance(outcome, PairAnswer | ScoreAnswer):
            await asyncio.to_thread(self._memory.put, key, outcome.model_dump())
        return outcome


def _back_off(attempt: int) -> float:
    """Return the delay, in seconds, before the next attempt. It doubles with each attempt, up to a limit.

    The delay is multiplied by a random number from 0.5 to 1, so that calls spread out.
    """
    return min(FIRST_BACK_OFF_SECONDS * 2**attempt, LONGEST_BACK_OFF_SECONDS) * random.uniform(0.5, 1.0)


def by_pairs(completions: int, outcomes: Mapping[tuple[int, int], tuple[Outcome, Outcome]]) -> Verdict:
    """Score each completion by the share of its comparisons that it wins. A tie counts as half a win.

    Each pair was compared in both orders. The pair does not count if the two answers contradict each other, or if an
    answer is missing. `agreement` is the share of pairs whose two answers agree.

    Args:
        completions: number of completions.
        outcomes: for each pair (i, j), the outcome with i first and the outcome with j first.
    """
    if completions < 2:  # the texts of all completions are equal, so the model was not asked
        return Verdict((0.5,) * completions)
    points: list[list[float]] = [[] for _ in range(completions)]
    contradictions, unanswered = 0, []
    for (i, j), (forward, backward) in outcomes.items():
        if not isinstance(forward, PairAnswer) or not isinstance(backward, PairAnswer):
            unanswered.append(next(o.why for o in (forward, backward) if isinstance(o, Unanswered)))
        elif forward.better != SWAPPED[backward.better]:
            contradictions += 1
        else:
            for completion, point in zip((i, j), POINTS[forward.better], strict=True):
                points[completion].append(point)
    scores = tuple(sum(p) / len(p) if p else None for p in points)
    reasons = (
        [f"{contradictions} of {len(outcomes)} pairs have contradicting answers in the two orders"]
        if contradictions
        else []
    )
    reasons += [f"{len(unanswered)} of {len(outcomes)} pairs have no answer ({unanswered[0]})"] if unanswered else []
    agreement = 1 - (contradictions + len(unanswered)) / len(outcomes)
    return Verdict(scores, agreement, "; ".join(reasons) if None in scores else "")


def by_scores(outcomes: Sequence[Outcome]) -> Verdict:
    """Return a verdict with the score that the model gave each completion; None for a completion without an answer."""
    scores = tuple(float(o.score) if isinstance(o, ScoreAnswer) else None for o in outcomes)
    return Verdict(scores, reason="; ".join(dict.fromkeys(o.why for o in outcomes if isinstance(o, Unanswered))))
