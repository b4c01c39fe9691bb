"""The pool of engines. It gives granules to engines, replaces engines that die, and finds groups that kill engines.

A granule is a batch of groups to score, or a batch of prompts for which completions are sampled. A pool with
`living=True` keeps its engines at the end of a run, so that they can load the next model.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Literal

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

from dpo_ray.cluster.memory_losses import lack_of_memory
from dpo_ray.cluster.resources import Resources
from dpo_ray.cluster.worker_logs import save_after_a_loss
from dpo_ray.config.reference import ReferenceConfig
from dpo_ray.errors import DpoRayError, InfrastructureError, SetupError
from dpo_ray.observe.metrics import ENGINE_DEATHS, ENGINES, SAMPLED_TOKENS
from dpo_ray.observe.recorder import count, record
from dpo_ray.reference.store.store import ReferenceStore

from .engine import Engine, StartScorer, start_vllm
from .gpu_release import Place, place_of_this_process, wait_until_dead, wait_until_memory_is_free
from .granule import Scored, Unscored
from .sampling import Sampled, Sampling
from .scorer import ScorerSettings

DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
"""The exceptions that Ray raises when the process or the node of an actor has died."""
MAX_FAILED_STARTS = 3  # in a row
NUMBER = re.compile(r"\b(0x)?[0-9a-f]*\d[0-9a-f]*\b")  # also an id in hexadecimal digits
OF_A_NODE = ("node was", "node has", "node is", "preempted")  # in what Ray says of an actor whose node is lost
MAX_FRUITLESS_DEATHS = 12  # in a row, with nothing scored in between; plus two for each engine of the pool
DEATHS_OF_A_GRANULE = 2  # a granule is split after this number of engines have died while they worked on it
PIECES = 8  # number of pieces into which a granule is split
CALLS_OF_AN_ENGINE = 2  # one call computes while the other writes, or waits for its turn
SAY_WAITING_SECONDS = 60.0
CLOSING_SECONDS = 30.0


@dataclass(frozen=True, order=True)
class _Work:
    """A piece of work: consecutive groups of one granule. Engines get the pieces in the order of the granules."""

    number: int  # of the granule
    first: int
    last: int | None = field(compare=False)  # exclusive; None: to the granule's end
    table: ray.ObjectRef = field(compare=False)
    deaths: int = field(default=0, compare=False)  # number of engines that died while they had this work
    alone: bool = field(default=False, compare=False)  # an engine died with this work; the next gets no other


@dataclass
class _Engine:
    """The driver's record of one engine: the engine's actor, its state, and the pieces of work that it is doing."""

    name: str
    actor: Any
    awaited: ray.ObjectRef  # the pending call that starts or closes the engine
    state: Literal["starting", "idle", "busy", "leaving", "dead"] = "starting"
    place: Place | None = None
    work: dict[ray.ObjectRef, _Work] = field(default_factory=dict)  # by the pending call, oldest first


class EnginePool:
    """A pool of engines on the cluster. Engines start when granules arrive, and stop when no granules are left.

    Args:
        resources: what each engine requests from Ray. With tensor parallelism, one engine has several GPUs.
        on_event: called with a message for the user, for example that an engine was lost or a group was left out.
        start: starts the scorer in the process of an engine; must be picklable.
        living: keep the engines after a call of `run` or `sample`. The engines stop only when `close` is called, or when
            a call of `run` or `sample` is interrupted.
    """

    def __init__(
        self,
        settings: ScorerSettings,
        store: ReferenceStore,
        config: ReferenceConfig,
        resources: Resources,
        on_event: Callable[[str], None],
        start: StartScorer = start_vllm,
        *,
        living: bool = False,
    ) -> None:
        self._settings, self._store, self._start, self._on_event = settings, store, start, on_event
        self._living = living
        self._sampling: Sampling | None = None  # of the current run; None: the run scores
        self._least, self._most = config.replicas, config.max_replicas or config.replicas
        self._resources = resources
        self._options: dict[str, Any] = {
            **self._resources.options(),
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": CALLS_OF_AN_ENGINE,
        }
        self._engines: list[_Engine] = []  # those that are not dead
        self._places: list[Place] = []  # GPUs that engines used; `close` waits until their memory is free
        self._waiting: list[_Work] = []  # a heap
        self._source: Iterator[ray.ObjectRef] | None = None
        self._known: tuple[str, ...] = ()  # segments that existed when the granules were looked up
        self._named = self._granules = self._fruitless_deaths = self._lost_engines = 0
        self._failed_starts: list[str] = []  # why the last engines died as they started

    @property
    def ready(self) -> int:
        """Count the engines that are ready to score."""
        return len(self._in("idle", "busy"))

    @property
    def size(self) -> int:
        """Count the engines, including those that are starting or waiting for resources."""
        return len(self._in("starting", "idle", "busy"))

    @property
    def processes(self) -> dict[str, int]:
        """Return the process id of each engine that is ready, by the engine's name."""
        return {e.name: e.place.pid for e in self._in("idle", "busy") if e.place is not None}

    @property
    def nodes(self) -> dict[str, str]:
        """Return the node (Ray's id) of each engine that is ready, by the engine's name."""
        return {e.name: e.place.node for e in self._in("idle", "busy") if e.place is not None}

    def run(self, granules: Iterable[ray.ObjectRef]) -> Generator[Scored, None, None]:
        """Score granules, and yield the result of each granule as soon as it is finished.

        When a result is yielded, its log-probs are in the store. A granule that was split has several results.

        Args:
            granules: references to tables of schema GRANULE. A granule is taken from the iterator only when an engine
                can use it. Engines get the granules in the order of the iterator.

        Raises:
            EngineError: an engine does not start, or returned a wrong result.
            InfrastructureError: engines die again and again, or do not release their memory.
            ArtifactError: the store cannot be written.
        """
        yield from self._run(granules, None)  # pyright: ignore[reportReturnType] - a run that scores yields no samples

    def sample(self, granules: Iterable[ray.ObjectRef], sampling: Sampling) -> Generator[Sampled | Scored, None, None]:
        """Sample completions for granules of prompts; yield the result of each granule as soon as it is finished.

        If engines die repeatedly while they sample for a single prompt, this prompt is left out, and a `Scored` that
        lists the prompt in `unscored` is yielded.

        Args:
            granules: references to tables of schema PROMPTS.

        Raises:
            EngineError, InfrastructureError: for the same reasons as `run`.
        """
        yield from self._run(granules, sampling)

    def load(self, settings: ScorerSettings, store: ReferenceStore) -> None:
        """Switch all engines to another model, whose log-probs are written to `store`.

        Engines that start later also load this model.

        Raises:
            EngineError: an engine cannot load the model.
        """
        self._settings, self._store = settings, store
        loading = {engine.actor.load.remote(settings, store): engine for engine in self._in("idle")}
        for answer, engine in loading.items():
            try:
                ray.get(answer)
            except DEATHS as error:
                for _ in self._lost(engine, _why(error)):  # yields nothing: the engine had no work
                    pass
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, DpoRayError) else error) from error

    def _run(
        self, granules: Iterable[ray.ObjectRef], sampling: Sampling | None
    ) -> Generator[Sampled | Scored, None, None]:
        self._sampling, self._granules = sampling, 0
        self._known = () if sampling else tuple(self._store.segments())
        self._source = iter(granules)
        try:
            self._place_work()
            while self._waiting or self._in("busy"):
                yield from self._answers()
                self._place_work()
        finally:
            if self._living and not self._in("busy"):
                self._waiting, self._source = [], None
                for engine in self._in("starting"):  # no granule is left for it
                    self._drop(engine)
                self._record_engines()
            else:
                self.close()

    def close(self) -> None:
        """Stop all engines. Wait until their processes have ended and the memory of their GPUs is free.

        Raises:
            InfrastructureError: the wait takes too long.
        """
        engines, self._engines, self._waiting, self._source = self._engines, [], [], None
        closing = [e.awaited for e in engines if e.state == "leaving"]
        closing += [e.actor.close.remote() for e in engines if e.state == "idle"]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSING_SECONDS)
        for engine in engines:
            ray.kill(engine.actor)
        self._record_engines()
        wait_until_dead([e.actor for e in engines])
        places, self._places = self._places, []
        wait_until_memory_is_free(places, self._settings.gpu_memory_fraction)

    def _in(self, *states: str) -> list[_Engine]:
        return [e for e in self._engines if e.state in states]

    def _record_engines(self) -> None:
        for state in ("starting", "idle", "busy"):
            record(ENGINES, len(self._in(state)), state=state)

    # ---- sending work to engines

    def _place_work(self) -> None:
        """Take as many granules as the pool can use, start engines, send granules, and stop engines without work."""
        self._grow()
        self._hand_out()
        while self._source is not None and len(self._waiting) <= self._most:
            table = next(self._source, None)
            if table is None:
                self._source = None
                break
            heapq.heappush(self._waiting, _Work(self._granules, 0, None, table))
            self._granules += 1
            self._grow()
            self._hand_out()
        if self._source is None and not self._living:
            self._shrink()
        self._record_engines()

    def _grow(self) -> None:
        """Start engines while more granules wait than engines are free.

        The largest number of engines is `replicas`, or `max_replicas` if many granules wait.

        An actor that fits on no node stays pending, which makes Ray's autoscaler add a node.
        """
        while len(self._waiting) > len(self._in("starting", "idle")) and (
            self.size < self._least or self.size < min(self._most, len(self._waiting))
        ):
            self._named += 1
            name = f"engine {self._named}"
            actor: Any = (
                ray.remote(Engine).options(**self._options).remote(name, self._settings, self._store, self._start)
            )
            self._engines.append(_Engine(name, actor, actor.__ray_call__.remote(_start)))

    def _hand_out(self) -> None:
        """Send a granule to each idle engine. If many granules wait, also send one to each busy engine."""
        for engine in self._in("idle"):
            if self._waiting:
                self._give(engine)
        for engine in self._in("busy"):
            alone = any(work.alone for work in (*engine.work.values(), *self._waiting[:1]))
            if len(self._waiting) >= self.size and len(engine.work) < CALLS_OF_AN_ENGINE and not alone:
                self._give(engine)

    def _give(self, engine: _Engine) -> None:
        work = heapq.heappop(self._waiting)
        if self._sampling is not None:
            answer = engine.actor.sample.remote(work.table, work.first, work.last, self._sampling)
        else:
            known = self._known if work.alone else None
            answer = engine.actor.score.remote(work.table, work.first, work.last, known)
        engine.work[answer] = work
        engine.state = "busy"

    def _shrink(self) -> None:
        """Stop idle engines for which no granule is left. Engines that have not finished starting are stopped first."""
        free = [*reversed(self._in("starting")), *self._in("idle")]
        for engine in free[: max(0, len(free) - len(self._waiting))]:
            if engine.state == "starting":
                self._drop(engine)
            else:
                engine.state, engine.awaited = "leaving", engine.actor.close.remote()

    # ---- receiving results from engines

    def _answers(self) -> Iterator[Sampled | Scored]:
        """Wait until the call of an engine returns. Handle what it returned, and yield the finished results."""
        awaited: dict[ray.ObjectRef, _Engine] = {}
        for engine in self._in("starting", "busy", "leaving"):
            awaited |= dict.fromkeys(engine.work or [engine.awaited], engine)
        ready, _ = ray.wait(list(awaited), num_returns=1, timeout=SAY_WAITING_SECONDS)
        if not ready and not self.ready:
            resources = self._resources.describe()
            self._on_event(
                f"{self.size} engines are starting or waiting for a node with free resources; each requests {resources}"
            )
        for answer in ready:
            yield from self._heard(awaited[answer], answer)

    def _heard(self, engine: _Engine, answer: ray.ObjectRef) -> Iterator[Sampled | Scored]:
        try:
            result = ray.get(answer)
        except RayTaskError as error:
            if isinstance(error.cause, DpoRayError):
                raise error.cause from error
            cause = error.cause or error
            yield from self._lost(engine, f"{type(cause).__name__}: {cause}")
        except DEATHS as error:
            yield from self._lost(engine, _why(error))
        else:
            if engine.state == "starting":
                self._started(engine, result)
            elif engine.state == "leaving":
                self._drop(engine)
            else:
                yield self._done(engine, answer, result)

    def _started(self, engine: _Engine, place: Place) -> None:
        if self._lost_engines:
            self._lost_engines -= 1
            self._on_event(f"{engine.name} is ready and replaces an engine that was lost")
        engine.state, engine.place, self._failed_starts = "idle", place, []
        self._places.append(place)

    def _done(self, engine: _Engine, answer: ray.ObjectRef, scored: Sampled | Scored) -> Sampled | Scored:
        work = engine.work.pop(answer)
        engine.state = "busy" if engine.work else "idle"
        self._fruitless_deaths = 0
        if isinstance(scored, Sampled):
            count(SAMPLED_TOKENS, scored.tokens)
        return replace(scored, granule=work.number)

    # ---- handling engine deaths

    def _lost(self, engine: _Engine, why: str) -> Iterator[Sampled | Scored]:
        """Handle the death of an engine: yield the results that it has returned, and queue its unfinished work again.

        The engine that gets this work next first searches the store, because the lost engine may have committed some of
        the log-probs.
        """
        state, place = engine.state, engine.place
        for answer in ray.wait(list(engine.work), num_returns=len(engine.work), timeout=0)[0] if engine.work else ():
            try:
                yield self._done(engine, answer, ray.get(answer))
            except (RayTaskError, *DEATHS):
                continue
        self._drop(engine)
        if state == "leaving":
            return
        location = f" (process {place.pid} on node {place.node[:8]})" if place else ""
        self._lost_engines += 1
        count(ENGINE_DEATHS, during="start" if state == "starting" else "work")
        save_after_a_loss()
        self._on_event(f"{engine.name}{location} was lost: {why}")
        if state == "starting":
            self._count_failed_start(why)
        else:
            self._count_fruitless_death(why)
        for work in engine.work.values():
            retry = replace(work, deaths=work.deaths + 1, alone=True)
            if retry.deaths < DEATHS_OF_A_GRANULE:
                heapq.heappush(self._waiting, retry)
            else:
                yield from self._split(retry, engine, why)

    def _split(self, work: _Work, engine: _Engine, why: str) -> Iterator[Scored]:
        """Split a piece of work into smaller pieces, because two engines have died while they worked on it.

        If the piece is a single group, leave out this group instead, and yield a result that lists it in `unscored`.
        """
        table = ray.get(work.table)
        last = len(table) if work.last is None else work.last
        if last - work.first == 1:
            group = table["group_id"][work.first].as_py()
            self._on_event(
                f"{DEATHS_OF_A_GRANULE} engines died while they processed the group {group.hex()} alone: it is left out"
            )
            yield Scored(1, 0, 0, 0, 0, 0.0, engine.name, (Unscored(group, "kills_engine", why),), work.number)
            return
        step = ceil((last - work.first) / PIECES)
        firsts = range(work.first, last, step)
        for first in firsts:
            heapq.heappush(self._waiting, replace(work, first=first, last=min(first + step, last), deaths=0))
        self._on_event(
            f"{DEATHS_OF_A_GRANULE} engines died while they processed a batch of {last - work.first:,} groups: "
            f"it is tried again in {len(firsts)} pieces"
        )

    def _drop(self, engine: _Engine) -> None:
        ray.kill(engine.actor)
        engine.state = "dead"
        self._engines.remove(engine)

    def _count_failed_start(self, why: str) -> None:
        self._failed_starts.append(why)
        if len(self._failed_starts) >= MAX_FAILED_STARTS:
            self._check_memory(why)
            kind = SetupError if died_alike(self._failed_starts) else InfrastructureError
            raise kind(
                f"{len(self._failed_starts)} engines in a row died while they started; the last one: {why}",
                where="reference",
                fix="see the engines' logs (--verbose); the usual cause is memory: change reference.gpu_memory_fraction, "
                "cluster.roles.reference.cpus or reference.tensor_parallel, then run again",
            )

    def _count_fruitless_death(self, why: str) -> None:
        self._fruitless_deaths += 1
        if self._fruitless_deaths > MAX_FRUITLESS_DEATHS + 2 * self._most:
            self._check_memory(why)
            raise InfrastructureError(
                f"{self._fruitless_deaths} engines in a row died, and nothing was scored in between; the last one: {why}",
                where="reference",
                fix="see the engines' logs (--verbose), fix the cause and run again: earlier scores are in the store; "
                "or set reference.engine=trainer",
            )

    def _check_memory(self, why: str) -> None:
        """Raise MemoryLimitError if engines were killed for lack of memory."""
        if (lack := lack_of_memory(self._resources.what, "reference", why)) is not None:
            raise lack


def _start(engine: Engine) -> Place:
    """Start the scorer of an engine, in the process of the engine. Return the process id, the node and the GPUs."""
    engine.start()
    return place_of_this_process()


def died_alike(causes: Sequence[str]) -> bool:
    """Return whether engines died of the same cause, which is not the loss of their nodes. Numbers and ids may differ."""
    kinds = {NUMBER.sub("#", cause) for cause in causes}
    return len(kinds) == 1 and not any(word in causes[0].lower() for word in OF_A_NODE)


def _why(error: Exception) -> str:
    """Extract the cause of an actor's death from Ray's long message, which also lists common causes."""
    text = " ".join(str(error).split())
    cause = text.rsplit("because ", 1)[-1].split(" Some common causes", 1)[0]
    return cause.replace("Worker exit type: SYSTEM_ERROR Worker exit detail: ", "")[:240] or type(error).__name__
