"""The stage `reference`: it scores the completions that the store lacks, then looks up the log-probs of all groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.cluster.cpu_work import cpu_labels
from dpo_ray.cluster.resources import Resources
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.config.train import TrainConfig
from dpo_ray.data.schemas import splits
from dpo_ray.errors import DataError
from dpo_ray.observe.metrics import (
    REFERENCE_COMPLETIONS,
    REFERENCE_GROUPS,
    REFERENCE_LEFT_OUT,
    REFERENCE_SECONDS,
    REFERENCE_TOKENS,
)
from dpo_ray.observe.recorder import count, record
from dpo_ray.reference.store.store import ReferenceStore, StoreIndex

from .granule import GRANULE, REASONS, Scored, Unscored
from .join import JoinedPart, join_part
from .lookup import LookupProgress, look_up
from .pool import EnginePool
from .scorer import ScorerSettings
from .trainer_pool import score_with_trainer

PARTS_OF_A_LOOK_UP = 4  # files of the tokens artifact that one task looks up; a granule may span several of them
MAX_LOOK_UPS = 8  # maximum number of look-up tasks that run concurrently
RESULTS_AHEAD = 8  # results that each task may produce in advance: four granules and their counts
QUARANTINE_FILE = "quarantine.parquet"


@dataclass
class ScoringTally:
    """Running totals of the look-up and of scoring."""

    groups: int  # number of groups of all splits
    done: int = 0  # groups that were found in the store, scored, or left out
    found: int = 0  # completions that the store had
    sequences: int = 0  # completions that were scored
    tokens: int = 0
    cached_tokens: int = 0
    rescored: int = 0
    seconds: float = 0.0  # computing time, summed over all engines
    engines: set[str] = field(default_factory=set)
    unscored: dict[bytes, Unscored] = field(default_factory=dict)

    def add_known(self, completions: int, groups: int) -> None:
        """Add what a look-up found in the store: completions, and groups whose completions it all found."""
        self.found += completions
        self.done += groups
        count(REFERENCE_COMPLETIONS, completions, source="store")
        self._record_groups()

    def add(self, scored: Scored) -> None:
        """Add the counts of one scored granule (a batch of groups)."""
        self.done += scored.groups
        for name in ("sequences", "tokens", "cached_tokens", "rescored", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(scored, name))
        if scored.tokens:
            self.engines.add(scored.engine)
        self.unscored |= {group.group_id: group for group in scored.unscored}
        count(REFERENCE_COMPLETIONS, scored.sequences, source="engine")
        count(REFERENCE_TOKENS, scored.tokens)
        count(REFERENCE_SECONDS, scored.seconds)
        count(REFERENCE_LEFT_OUT, len(scored.unscored))
        self._record_groups()

    def _record_groups(self) -> None:
        record(REFERENCE_GROUPS, self.done, state="done")
        record(REFERENCE_GROUPS, self.groups - self.done, state="waiting")

    @property
    def tokens_per_second(self) -> float:
        """Return the mean speed of one engine, in tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def describe(self) -> str:
        """Describe the totals in one line."""
        cached = self.cached_tokens / self.tokens if self.tokens else 0.0
        return (
            f"{self.sequences:,} sequences scored, {self.found:,} known, {self.tokens_per_second:,.0f} tokens/s per engine, "
            f"{cached:.0%} of the tokens cached"
        )

    def figures(self) -> dict[str, Any]:
        """Return the totals by name, as figures for the artifact's manifest."""
        names = ("sequences", "found", "tokens", "cached_tokens", "rescored", "seconds", "tokens_per_second")
        return {**{name: getattr(self, name) for name in names}, "engines": len(self.engines)}


def token_parts(tokens: Artifact) -> list[str]:
    """List the files with groups of a tokens artifact. Files of training data come first."""
    return [name for split in splits(tokens) for name in tokens.names(f"{split}/")]


def score(
    tokens: Artifact,
    store: ReferenceStore,
    settings: ScorerSettings,
    config: ReferenceConfig,
    train: TrainConfig,
    request: Resources,
    max_unscored_fraction: float,
    advance: Callable[[int, str], None],
    say: Callable[[str], None],
    pool: EnginePool | None = None,
) -> ScoringTally:
    """Score all completions that the store lacks. If the store lacks none, no engine is started.

    Args:
        request: the resources that each engine (or each training worker, if the trainer scores) requests from Ray.
        advance: called with the number of groups that are done since the last call, and with a description of the
            totals.
        say: called with messages about the engines and about the groups that are left out.
        pool: running engines, which load the model. None: this function starts engines, and stops them at the end.

    Raises:
        DataError: more than the fraction `max_unscored_fraction` of all groups cannot be scored.
        EngineError, InfrastructureError, TrainError, ArtifactError: raised by the pool of engines or by the trainer.
    """
    tally = ScoringTally(sum(tokens.manifest.rows[f"{split}/admitted"] for split in splits(tokens)))

    def on_lookup(news: LookupProgress) -> None:
        tally.add_known(news.found, news.known_groups)
        advance(news.known_groups, tally.describe())

    # Both are closed here, also after an error: a generator that is closed later finds no Ray any more.
    with closing(look_up_all(tokens, store, config, request.cpus, on_lookup)) as granules:
        if config.engine == "trainer":
            pool, answers = None, score_with_trainer(settings, store, train, list(granules), request, say)
        elif pool is None:
            pool = EnginePool(settings, store, config, request, say)
            answers = pool.run(granules)
        else:
            pool.load(settings, store)
            answers = pool.run(granules)
        with closing(answers):
            for scored in answers:
                tally.add(scored)
                for group in scored.unscored:
                    say(f"the group {group.group_id.hex()} is left out: {REASONS[group.reason]}")
                check_unscored(tally, max_unscored_fraction)
                advance(scored.groups, tally.describe() + (f", engines {pool.ready}/{pool.size}" if pool else ""))
    return tally


def check_unscored(tally: ScoringTally, limit: float) -> None:
    """Check that the fraction of groups without log-probs is not above `limit`.

    Raises:
        DataError: the fraction is above `limit`. The error lists why log-probs are missing.
    """
    count = len(tally.unscored)
    if count > limit * tally.groups:
        reasons = sorted({f"{REASONS[u.reason]} ({u.detail})" for u in tally.unscored.values()})
        raise DataError(
            f"{count:,} of {tally.groups:,} groups have no reference log-probs, more than the limit of {limit:.1%}: "
            + "; ".join(reasons[:3]),
            where="reference",
            fix="check the groups listed above and correct or remove their rows; set reference.engine=trainer; "
            "or raise data.max_quarantined_fraction",
        )


def look_up_all(
    tokens: Artifact,
    store: ReferenceStore,
    config: ReferenceConfig,
    engine_cpus: float,
    on_lookup: Callable[[LookupProgress], None],
) -> Generator[ray.ObjectRef, None, None]:
    """Look up all groups in the store, in Ray tasks, and yield granules of the completions that the store lacks.

    The granules are in the order of the groups. Each task produces a few granules in advance, then waits until the
    caller has taken them.

    Args:
        engine_cpus: CPUs that each engine requests, which the tasks must leave free.
        on_lookup: called with the counts of the look-up.
    """
    segments = store.segments()  # listed once, because a task that Ray runs again must give the same granules
    make_index: Any = ray.remote(_index).options(label_selector=cpu_labels())
    index = make_index.remote(store, segments)
    # At least one task runs beside the engines, whatever the cluster's size; a waiting task keeps its CPU.
    room = ray.cluster_resources().get("CPU", 0) - config.replicas * engine_cpus
    task: Any = ray.remote(_look_up).options(
        num_returns="streaming", _generator_backpressure_num_objects=RESULTS_AHEAD, label_selector=cpu_labels()
    )
    parts = token_parts(tokens)
    todo = iter([parts[i : i + PARTS_OF_A_LOOK_UP] for i in range(0, len(parts), PARTS_OF_A_LOOK_UP)])
    running: deque[Any] = deque()
    try:
        while True:
            while len(running) < max(1, min(MAX_LOOK_UPS, int(room))) and (names := next(todo, None)):
                running.append(task.remote(names, tokens, store, index, config.groups_per_granule))
            if not running:
                return
            for result in running[0]:
                news: Any = ray.get(result)
                on_lookup(news)
                if news.granule:
                    yield next(running[0])
            running.popleft()
    finally:
        for results in running:  # if the consumer stops early, the tasks would otherwise wait for ever
            ray.cancel(results)


def _index(store: ReferenceStore, segments: Sequence[str] | None = None) -> StoreIndex:
    return store.index(segments)


def _look_up(
    names: Sequence[str], tokens: Artifact, store: ReferenceStore, index: StoreIndex, groups_per_granule: int
) -> Iterator[LookupProgress | pa.Table]:
    tables = (read_table(tokens, name, GRANULE.names) for name in names)
    yield from look_up(tables, store, index, groups_per_granule)


def join(
    tokens: Artifact, store: ReferenceStore, tally: ScoringTally, staging: Staging, provenance: Provenance
) -> Artifact:
    """Fetch the log-probs of every group from the store, in Ray tasks, and commit the artifact `reference`.

    Raises:
        ArtifactError: a completion has no log-probs, or their number differs from its number of tokens.
    """
    make_index: Any = ray.remote(_index).options(label_selector=cpu_labels())
    index, unscored = make_index.remote(store), ray.put(tally.unscored)
    task: Any = ray.remote(join_part).options(label_selector=cpu_labels())
    parts: list[JoinedPart] = ray.get(
        [task.remote(name, tokens, store, index, unscored, staging) for name in token_parts(tokens)]
    )
    entries = [part.entry for part in parts]
    quarantine = pa.concat_tables(part.quarantine for part in parts) if parts else None
    rows = {"groups": sum(entry.rows or 0 for entry in entries)}
    for split in splits(tokens):
        pairs = zip(parts, entries, strict=True)
        rows[f"{split}/unscored"] = sum(len(p.quarantine) for p, e in pairs if e.name.startswith(f"{split}/"))
    if quarantine is not None and len(quarantine):
        entries.append(_write_quarantine(quarantine, staging))
    return provenance.commit(staging, entries, rows=rows, figures=tally.figures())


def _write_quarantine(quarantine: pa.Table, staging: Staging) -> FileEntry:
    return staging.write(QUARANTINE_FILE, parquet_bytes(quarantine), rows=len(quarantine))
