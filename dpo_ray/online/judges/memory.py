"""Stores the answers of judges, so that no judge does the same work twice. A crash loses no stored answer."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dpo_ray.artifacts.digest import canonical_json, digest
from dpo_ray.artifacts.journal import Journal, whole_lines
from dpo_ray.artifacts.storage import Storage

from .protocol import Memory, Question, Verdict

READERS = 16  # objects that are fetched concurrently; a bucket takes tens of milliseconds to answer


class JournalMemory:
    """The stored answers of one judge, in files with one JSON line per answer, on a disk or in a bucket.

    Each process writes separate files. When a process opens the memory, it reads the files of all processes, but not the
    answers that other processes write later. So two processes may store different answers to one question. When the
    memory is opened again, the answer that was written first counts (by the clocks of the machines). Several threads
    may use one object; answers that several threads put at the same time are written together.
    """

    def __init__(self, storage: Storage, digest: str, writer: str) -> None:
        """Read all stored answers of a judge.

        Args:
            storage: where the answers of all judges are stored.
            digest: digest of the judge (`make.judge_digest`), so that answers of other judges are not read.
            writer: name for the files of this process; no other process may use this name at the same time.

        Raises:
            ArtifactError, InfrastructureError: the stored answers cannot be read.
        """
        self._place, self._writer = storage.child(digest), writer
        self._answers = _read(self._place)
        self._pending: dict[str, Any] = {}
        self._state, self._writing = threading.Lock(), threading.Lock()
        self._journal: Journal | None = None
        self._objects, self._token = 0, secrets.token_hex(4)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Any | None:
        """Return the stored answer to the question with this key; None if no answer is stored yet."""
        return self._answers.get(key)

    def put(self, key: str, answer: Any) -> None:
        """Store one answer. If the key has an answer already, the first answer is kept."""
        self.put_all({key: answer})

    def put_all(self, answers: Mapping[str, Any]) -> None:
        """Store several answers with one write. When this method returns, they survive a crash.

        Raises:
            ArtifactError, InfrastructureError: the answers could not be stored, so they must not be used.
        """
        with self._state:
            self._pending |= {key: answer for key, answer in answers.items() if key not in self._answers}
        with self._writing:
            with self._state:
                batch, self._pending = self._pending, {}
            if not batch:  # another thread has written these answers together with its own
                return
            try:
                self._write(batch)
            except BaseException:
                with self._state:  # threads that wait to write these answers find them here, and try it themselves
                    self._pending = batch | self._pending
                raise
            self._answers |= batch

    def _write(self, answers: Mapping[str, Any]) -> None:
        now = time.time()
        lines = [canonical_json({"key": k, "answer": a, "unix_seconds": now}) for k, a in answers.items()]
        if self._place.is_local:
            if self._journal is None:
                self._journal = Journal(self._place.local_path(f"{self._writer}.jsonl"))
            self._journal.append(lines)
        else:
            name = f"{self._writer}-{self._token}-{self._objects:06d}.jsonl"
            self._place.write(name, b"".join(line + b"\n" for line in lines))
            self._objects += 1


def _read(place: Storage) -> dict[str, Any]:
    """Read the answers of all writers. If a key has several answers, the one that was written first counts."""
    with ThreadPoolExecutor(READERS) as pool:
        files = list(pool.map(place.read_bytes, place.list_files()))
    first: dict[str, tuple[float, Any]] = {}  # the time of each key's answer, and the answer
    for line in (line for data in files for line in whole_lines(data)):
        try:
            entry = json.loads(line)
            # A line without a time is of an older version.
            key, written = entry["key"], (float(entry.get("unix_seconds", 0.0)), entry["answer"])
        except (ValueError, KeyError, TypeError):
            continue  # a disk that lost power may fill a block with zeros; the question of this line is asked again
        if key not in first or written[0] < first[key][0]:
            first[key] = written
    return {key: answer for key, (_, answer) in first.items()}


class NoMemory:
    """A memory that stores nothing, for a judge that is constructed only to check the judge's settings."""

    def get(self, key: str) -> Any | None:
        return None

    def put(self, key: str, answer: Any) -> None: ...

    def put_all(self, answers: Mapping[str, Any]) -> None: ...


class Section:
    """The part of a memory that belongs to one member of an ensemble. Its keys cannot equal those of other members."""

    def __init__(self, memory: Memory, name: str) -> None:
        self._memory, self._name = memory, name

    def get(self, key: str) -> Any | None:
        return self._memory.get(f"{self._name}/{key}")

    def put(self, key: str, answer: Any) -> None:
        self._memory.put(f"{self._name}/{key}", answer)

    def put_all(self, answers: Mapping[str, Any]) -> None:
        self._memory.put_all({f"{self._name}/{key}": answer for key, answer in answers.items()})


def remembered(
    questions: Sequence[Question],
    memory: Memory,
    questions_per_batch: int,
    ask: Callable[[Sequence[Question]], Sequence[Verdict]],
) -> Iterator[tuple[int, Verdict]]:
    """Yield the index and the verdict of each question (a prompt with its completions), stored verdicts first.

    Questions without a stored verdict are passed to `ask` in batches. The verdicts of a batch are stored before they are
    yielded.

    Args:
        ask: returns the verdicts of a batch of different questions. The field `members` of the verdicts is not stored.
    """
    places: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        key = digest([question.prompt, list(question.completions), question.answer])
        places.setdefault(key, []).append(number)
    unknown = []
    for key, numbers in places.items():
        known = memory.get(key)
        if known is None:
            unknown.append(key)
        else:
            verdict = Verdict(tuple(known["scores"]), reason=known["reason"])
            yield from ((number, verdict) for number in numbers)
    for start in range(0, len(unknown), questions_per_batch):
        batch = unknown[start : start + questions_per_batch]
        verdicts = ask([questions[places[key][0]] for key in batch])
        memory.put_all(
            {k: {"scores": list(v.scores), "reason": v.reason} for k, v in zip(batch, verdicts, strict=True)}
        )
        yield from ((number, v) for key, v in zip(batch, verdicts, strict=True) for number in places[key])
