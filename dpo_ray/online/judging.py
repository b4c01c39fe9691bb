"""The stage `judge`: a pool of Ray actors judges all completions. Answers that are stored are not computed again."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.storage import Storage
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.cluster.resources import judge_resources
from dpo_ray.config.judge import Judge, members_of, replicas_of
from dpo_ray.config.roles import JudgeRole
from dpo_ray.errors import DpoRayError, JudgeLostError
from dpo_ray.online.judges.make import judge_digest, make_judge
from dpo_ray.online.judges.memory import JournalMemory
from dpo_ray.online.judges.protocol import Question, Spending, Usage, Verdict
from dpo_ray.reference.pool import DEATHS

SAY_WAITING_SECONDS = 60.0
MAX_DEATHS = 5  # maximum number of judge processes that die in a row, with no answer in between
VERDICTS = pa.schema(
    [
        ("group_id", pa.binary(16)),
        ("scores", pa.list_(pa.float64())),
        ("agreement", pa.float64()),
        ("reason", pa.string()),
        ("members", pa.string()),  # JSON: the scores of each member of an ensemble
    ]
)


class JudgeActor:
    """A Ray actor: a process with one judge."""

    def __init__(self, config: Judge, memory: Storage, name: str, device: str) -> None:
        self._config, self._memory, self._name, self._device = config, memory, name, device
        self._judge: Any = None
        self._spending = Spending()

    def judge(self, questions: Sequence[Question], spent_usd: float) -> tuple[list[Verdict], Usage]:
        """Judge all questions; return their verdicts and the cost.

        Args:
            spent_usd: USD that this round has already spent on all judges.

        Raises:
            JudgeError, ConfigError: the judge cannot work. The answers before the failure are stored.
        """
        if self._judge is None:  # an error in a method reaches the driver, an error in a constructor does not
            journal = JournalMemory(self._memory, judge_digest(self._config), self._name)
            self._judge = make_judge(self._config, journal, self._device, self._spending)
        self._spending.set(spent_usd)
        before: Usage = self._judge.usage
        verdicts = dict(self._judge.judge(questions))
        spent = Usage(*(getattr(self._judge.usage, n) - getattr(before, n) for n in Usage.__dataclass_fields__))
        return [verdicts[i] for i in range(len(questions))], spent


class Judges:
    """A pool of actors that all run the same judge. The actors start at the first call of `ask`, and stop at `close`."""

    def __init__(
        self,
        config: Judge,
        role: JudgeRole,
        memory: Storage,
        run: str,
        device: str,
        on_event: Callable[[str], None],
    ) -> None:
        """Create a pool of judges. No actor is started yet.

        Args:
            memory: storage of the judges' answers; all runs share it.
            run: unique name of this run, so that no other run writes to the same files of `memory`.
            device: device of reward models.
            on_event: called with messages for the user.
        """
        self._config, self._memory, self._run, self._device, self._on_event = config, memory, run, device, on_event
        members = members_of(config)
        self._replicas, self._resources = replicas_of(config, role), judge_resources(config, role)
        self._batch = min(member.questions_per_batch for member in members)
        self._actors: list[Any] = []  # all that are alive
        self._named = 0
        self._idle: list[Any] = []

    def ask(
        self, questions: Sequence[Question], advance: Callable[[int], None], spent_usd: float = 0.0
    ) -> tuple[list[Verdict], Usage]:
        """Judge all questions (prompts with their completions); return their verdicts and the cost.

        If an actor dies, another one takes over its questions. Only answers that are not stored are computed again.

        Args:
            advance: called with the number of questions done since the last call.
            spent_usd: USD that this round has already spent on all judges.

        Raises:
            JudgeError: the judge cannot work, or (JudgeLostError) its processes die again and again.
        """
        chunks = [(i, questions[i : i + self._batch]) for i in range(0, len(questions), self._batch)]
        waiting, running, verdicts = deque(chunks), {}, dict[int, Verdict]()
        usage, deaths = Usage(), 0
        while waiting or running:
            while waiting and len(running) < self._replicas:
                actor = self._idle.pop() if self._idle else self._start()
                work = waiting.popleft()
                running[actor.judge.remote(work[1], spent_usd + usage.usd)] = actor, work
            ready, _ = ray.wait(list(running), num_returns=1, timeout=SAY_WAITING_SECONDS)
            if not ready:
                self._on_event(
                    f"{len(running)} judges are working or waiting for free resources; each requests "
                    f"{self._resources.describe()}"
                )
                continue
            answer = ready[0]
            actor, (first, chunk) = running.pop(answer)
            try:
                chunk_verdicts, spent = ray.get(answer)
            except RayTaskError as error:
                cause = error.cause
                raise (cause if isinstance(cause, DpoRayError) else error) from error
            except DEATHS as error:
                deaths += 1
                if deaths > MAX_DEATHS:
                    raise JudgeLostError(
                        f"the judge's processes died {deaths} times in a row; last error: {str(error).splitlines()[0]}",
                        where=f"online.judge (type {self._config.type})",
                        fix="read the judge's log (--verbose), correct the cause, and run again: stored verdicts are kept",
                    ) from error
                self._on_event("a judge's process was lost: another process takes over its open questions")
                waiting.appendleft((first, chunk))
                continue
            self._idle.append(actor)
            deaths, usage = 0, usage + spent
            verdicts |= {first + i: verdict for i, verdict in enumerate(chunk_verdicts)}
            advance(len(chunk))
        return [verdicts[i] for i in range(len(questions))], usage

    @property
    def gpus(self) -> float:
        """Return the number of GPUs that each actor holds."""
        return self._resources.gpus

    def close(self) -> None:
        """Stop all actors. A later call of `ask` starts new ones."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._idle = [], []

    def _start(self) -> Any:
        self._named += 1
        name = f"{self._run}-{self._named}"
        actor = ray.remote(JudgeActor).options(**self._resources.options(), max_restarts=0)
        self._actors.append(actor.remote(self._config, self._memory, name, self._device))
        return self._actors[-1]


def commit(
    keys: Sequence[bytes], verdicts: Sequence[Verdict], usage: Usage, staging: Staging, provenance: Provenance
) -> Artifact:
    """Commit the artifact `judge`: one verdict for each sampled prompt, which covers all completions of the prompt."""
    columns = {
        "group_id": keys,
        "scores": [list(v.scores) for v in verdicts],
        "agreement": [v.agreement for v in verdicts],
        "reason": [v.reason for v in verdicts],
        "members": [json.dumps({name: list(s) for name, s in v.members.items()}) for v in verdicts],
    }
    table = pa.table(columns, schema=VERDICTS)
    entry = staging.write("verdicts.parquet", parquet_bytes(table), rows=len(table))
    abstained = sum(all(s is None for s in v.scores) for v in verdicts)
    rows = {"prompts": len(verdicts), "abstained": abstained}
    return provenance.commit(staging, [entry], rows=rows, figures={"usage": vars(usage)})


def read_verdicts(judged: Artifact) -> dict[bytes, Verdict]:
    """Read the verdicts of an artifact `judge`. Return them by the key (hash) of the prompt."""
    return {
        row["group_id"]: Verdict(
            tuple(row["scores"]),
            row["agreement"],
            row["reason"],
            {name: tuple(scores) for name, scores in json.loads(row["members"]).items()},
        )
        for row in read_table(judged, "verdicts.parquet").to_pylist()
    }
