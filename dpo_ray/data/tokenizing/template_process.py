"""A process that compiles and renders chat templates, which are programs of others: limited in time and in memory."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle  # noqa: TID251 - only the process that we start reads it; what it answers is text
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import dpo_ray
from dpo_ray.data.groups import Message
from dpo_ray.errors import InfrastructureError

from .sandbox import MAX_CHARACTERS
from .template_program import (
    DONE,
    ERROR,
    FRAME,
    INVALID,
    LIMIT,
    MEMORY_BYTES,
    OUT_OF_MEMORY,
    REQUEST,
    TEXT,
    TEXT_SECONDS,
)

WAIT_SECONDS = 60.0
"""Wall-clock time without an answer after which the process is killed: the limits of a process that sleeps or stands."""

REQUEST_BYTES = 2**18  # of groups that are sent at once
_KINDS = (TEXT, DONE, LIMIT, ERROR, INVALID)
_PROGRAM = "dpo_ray.data.tokenizing.template_program"
_KEPT = ("LD_LIBRARY_PATH", "PYTHONHOME")  # without which some Pythons do not start; nothing else is passed on


class Asked(NamedTuple):
    """A group of texts to render: the number of its template, its variables, and for each text what differs."""

    template: int
    variables: Mapping[str, Any]
    texts: Sequence[tuple[Sequence[Message], bool]]  # messages, add_generation_prompt


class Answer(NamedTuple):
    """The texts of a group up to the first that failed. `end`: DONE, or LIMIT, ERROR or INVALID (the template)."""

    texts: list[str]
    end: bytes = DONE
    detail: str = ""


class TemplateProcess:
    """A context that holds the process. It starts when it is needed, and again after a text has ended it.

    CPU time is limited for each text, so a busy machine rejects no valid row; memory for the whole process. (macOS does
    not enforce the limit of memory.) The process is given no environment, and ends with the one that started it, at the
    latest when the text that it renders reaches its limit.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._end()

    def fault(self, template: str, date: datetime.date) -> str:
        """Compile a template; return why that is not possible, or "".

        Raises:
            InfrastructureError: the process does not start.
        """
        (answer,) = self.render((template,), date, {}, [Asked(0, {}, ())])
        return f"compiling it {answer.detail}" if answer.end == LIMIT else answer.detail

    def render(
        self, templates: Sequence[str], date: datetime.date, shared: Mapping[str, Any], groups: Sequence[Asked]
    ) -> list[Answer]:
        """Render the first groups, one or more: as many as fit into a request, up to one that exceeds its limits.

        Args:
            date: what `strftime_now` formats.
            shared: variables of all groups.

        Raises:
            InfrastructureError: the process does not start.
        """
        packed = _packed(groups)
        if not packed:
            return [Answer([], ERROR, "a value of the row cannot be given to a template")]
        request = pickle.dumps((tuple(templates), date, shared, packed), pickle.HIGHEST_PROTOCOL)
        with self._lock:
            try:
                return self._answers(request, len(packed))
            except BaseException:
                self._end()  # what it has not answered yet would be taken for the answer to the next request
                raise

    def _answers(self, request: bytes, count: int) -> list[Answer]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._start()
        answers: list[Answer] = []
        texts: list[str] = []
        try:
            self._channel.sendall(REQUEST.pack(len(request)) + request)
            while len(answers) < count and not (answers and answers[-1].end == LIMIT):
                kind, text = _frame(self._replies)
                if kind == TEXT:
                    texts.append(text)
                else:
                    answers.append(Answer(texts, kind, text))
                    texts = []
        except (OSError, EOFError, ValueError) as error:  # OSError includes timeouts
            answers.append(Answer(texts, LIMIT, self._cause(error)))
        return answers

    def _cause(self, error: Exception) -> str:
        """End the process, and describe how the text that it rendered has exceeded its limits."""
        assert self._process is not None  # noqa: S101 - started
        if isinstance(error, EOFError | ConnectionError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(WAIT_SECONDS)  # for its exit code
        code = self._process.poll()
        self._end()
        if code == -signal.SIGPROF:
            return f"took longer than {TEXT_SECONDS:g} s of CPU time"
        if code == OUT_OF_MEMORY:
            return f"needed more than {MEMORY_BYTES >> 20:,} MiB of memory"
        if code is not None:
            return f"ended its process (exit code {code})"
        return (
            f"gave no answer within {WAIT_SECONDS:g} s" if isinstance(error, TimeoutError) else "gave no valid answer"
        )

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(dpo_ray.__file__).parents[1])
        path = os.pathsep.join([root, *(os.path.abspath(place) for place in sys.path)])
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", "-m", _PROGRAM],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env={"PYTHONPATH": path, **{name: os.environ[name] for name in _KEPT if name in os.environ}},
                start_new_session=True,  # Ctrl-C is for those who wait for the texts
            )
        self._channel = ours
        self._channel.settimeout(WAIT_SECONDS)
        self._replies = ours.makefile("rb")
        try:
            _frame(self._replies)
        except (OSError, EOFError, ValueError):
            said = self._end().decode("utf-8", "replace").strip().splitlines()
            raise InfrastructureError(
                f"the process that renders chat templates does not start: {said[-1] if said else 'it says nothing'}",
                where=sys.executable,
                fix=f"try {sys.executable} -m {_PROGRAM}",
            ) from None

    def _end(self) -> bytes:
        """Kill the process, if there is one; return what it wrote to standard error."""
        if self._process is None:
            return b""
        self._process.kill()
        _, said = self._process.communicate()
        self._replies.close()
        self._channel.close()
        self._process = None
        return said


def _packed(groups: Sequence[Asked]) -> list[bytes]:
    """Pickle the first groups, as many as fit into one request, up to one that cannot be pickled."""
    packed: list[bytes] = []
    size_bytes = 0
    for group in groups:
        try:
            packed.append(pickle.dumps(tuple(group), pickle.HIGHEST_PROTOCOL))
        except Exception:  # a format of others may put anything into a row
            break
        size_bytes += len(packed[-1])
        if size_bytes >= REQUEST_BYTES:
            break
    return packed


def _frame(replies: IO[bytes]) -> tuple[bytes, str]:
    """Read a frame: its kind, and its text.

    Raises:
        EOFError: the process has ended.
        ValueError: it wrote something else than a frame.
    """
    kind, size_bytes = FRAME.unpack(_exactly(replies, FRAME.size))
    if size_bytes > 4 * MAX_CHARACTERS or kind not in _KINDS:
        raise ValueError("no frame")
    return kind, _exactly(replies, size_bytes).decode("utf-8", "surrogatepass")


def _exactly(replies: IO[bytes], size_bytes: int) -> bytes:
    data = replies.read(size_bytes)
    if len(data) < size_bytes:
        raise EOFError
    return data
