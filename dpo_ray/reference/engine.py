"""One engine of the pool. It scores granules (batches of groups), and stores one granule while it scores the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_ray.reference.store.store import ReferenceStore

from .granule import Scored, Unscored
from .lookup import find_missing
from .sampling import SAMPLES, Sampled, Sampling
from .scorer import Scorer, ScoreRequest, ScorerSettings

StartScorer = Callable[[ScorerSettings], Scorer]


def start_vllm(settings: ScorerSettings) -> Scorer:
    """Start a vLLM engine in this process."""
    from dpo_ray.reference.vllm.scorer import VllmScorer  # vLLM is imported only in processes that run an engine

    return VllmScorer(settings)


def start_sampling_vllm(settings: ScorerSettings) -> Scorer:
    """Start a vLLM engine in this process that can also sample."""
    from dpo_ray.reference.vllm.scorer import VllmScorer

    return VllmScorer(settings, enable_sampling=True)


@dataclass(frozen=True)
class _Computed:
    token_logps: list[np.ndarray | None]  # float32 [completion tokens] of each request
    cached_tokens: int
    rescored: int
    seconds: float


class Engine:
    """A scorer, and the store to which it writes its log-probs.

    Two calls of `score` may run concurrently: one computes while the other writes. All computations run in the same
    thread, because torch has separate settings for each thread, such as the number of compute threads.
    """

    def __init__(self, name: str, settings: ScorerSettings, store: ReferenceStore, start: StartScorer) -> None:
        self._name, self._settings, self._store, self._start = name, settings, store, start
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="scorer")

    def start(self) -> None:
        """Start the scorer, which loads the model.

        Raises:
            EngineError: the scorer does not start.
        """
        self._scorer = self._computing.submit(self._start, self._settings).result()

    def load(self, settings: ScorerSettings, store: ReferenceStore) -> None:
        """Switch to another model for scoring and sampling.

        If the running scorer can load this model, it is kept; otherwise a new scorer is started.

        Raises:
            EngineError: the model cannot be loaded.
        """
        self._store = store
        if settings != self._settings:
            self._settings = settings
            self._computing.submit(self._reload).result()

    def _reload(self) -> None:
        if not self._scorer.load(self._settings):
            self._scorer.close()
            self._scorer = self._start(self._settings)

    def sample(self, granule: pa.Table, first: int, last: int | None, sampling: Sampling) -> Sampled:
        """Sample completions for the rows `first` to `last` of a granule (a table of schema PROMPTS).

        `last` is exclusive; None means to the end.
        """
        table = granule.slice(first, None if last is None else last - first)
        began = time.monotonic()
        prompts, seeds = table["prompt_ids"].to_pylist(), table["seeds"].to_pylist()
        answers = self._computing.submit(lambda: self._scorer.sample(prompts, seeds, sampling)).result()
        completions = [[ids for ids, _ in own] for own in answers]
        ended = [[done for _, done in own] for own in answers]
        columns = {"group_id": table["group_id"], "prompt_ids": table["prompt_ids"]}
        sampled = pa.table({**columns, "completion_ids": completions, "ended": ended}, schema=SAMPLES)
        tokens = sum(len(ids) for own in completions for ids in own)
        return Sampled(sampled, tokens, time.monotonic() - began, self._name)

    def alive(self) -> bool:
        """Return True. If a call of this method fails, the process of this engine has ended."""
        return True

    def score(self, granule: pa.Table, first: int, last: int | None, known: Sequence[str] | None) -> Scored:
        """Score the groups `first` to `last` of a granule, and commit their log-probs as one file of the store.

        Args:
            last: exclusive; None means to the end.
            known: None if no other engine has worked on this granule. Otherwise another engine died while it scored this
                granule, and may have committed some of the granule's log-probs. `known` then lists the segments (files)
                that the store had when the granule was made. Only newer segments are searched, and only log-probs that
                are still missing are computed.

        Raises:
            EngineError: the scorer returned a wrong result, such as log-probs of other tokens.
            ArtifactError: the store cannot be written.
        """
        table = granule.slice(first, None if last is None else last - first)
        groups, committed = len(table), 0
        if known is not None:
            new = sorted(set(self._store.segments()) - set(known))
            table, committed = find_missing(table, self._store, self._store.index(new))
        requests, owners, keys = self._requests(table)
        if not requests:
            return Scored(groups, committed, 0, 0, 0, 0.0, self._name)
        computed = self._computing.submit(self._compute, requests).result()
        valid = [i for i, logps in enumerate(computed.token_logps) if logps is not None]
        if valid:
            self._store.append(keys[valid], [computed.token_logps[i] for i in valid])
        without = sorted({g for i in set(range(len(requests))) - set(valid) for g in owners[i]})
        ids = table["group_id"].take(pa.array(without, pa.int64())).to_pylist()
        return Scored(
            groups=groups,
            sequences=len(valid) + committed,
            tokens=sum(len(r.prompt_ids) + len(r.completion_ids) for r in requests),
            cached_tokens=computed.cached_tokens,
            rescored=computed.rescored,
            seconds=computed.seconds,
            engine=self._name,
            unscored=tuple(Unscored(i, "no_log_probs", f"scored by {self._name}") for i in ids),
        )

    def close(self) -> None:
        """Free the scorer's memory."""
        self._computing.submit(self._scorer.close).result()

    def _compute(self, requests: Sequence[ScoreRequest]) -> _Computed:
        scorer, began = self._scorer, time.monotonic()
        cached, rescored = scorer.cached_tokens, scorer.rescored
        token_logps = scorer.score(requests)
        return _Computed(
            token_logps, scorer.cached_tokens - cached, scorer.rescored - rescored, time.monotonic() - began
        )

    def _requests(self, table: pa.Table) -> tuple[list[ScoreRequest], list[list[int]], np.ndarray]:
        """Build one request for each distinct sequence (a prompt and a completion).

        Returns:
            The requests. For each request, the rows of the groups that contain the sequence. For each request, the key
            of the sequence in the store.
        """
        keys = self._store.keys(table)
        firsts: dict[bytes, int] = {}  # by key, the number of its request
        requests: list[ScoreRequest] = []
        owners: list[list[int]] = []
        first_completions: list[int] = []  # for each request, the first completion with its sequence
        completion = 0
        prompts, lists = table["prompt_ids"], table["completion_ids"]
        for row in range(len(table)):
            prompt = prompts[row].values.to_numpy()
            for ids in lists[row].values:
                number = firsts.setdefault(keys[completion].tobytes(), len(requests))
                if number == len(requests):
                    requests.append(ScoreRequest(row, prompt, ids.values.to_numpy()))
                    owners.append([])
                    first_completions.append(completion)
                owners[number].append(row)
                completion += 1
        return requests, owners, keys[first_completions]
