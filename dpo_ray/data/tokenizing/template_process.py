"""A process that compiles and renders chat templates. Its time and memory are limited, as templates are foreign programs."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pickle  # noqa: TID251 - only the process that we start reads it; what it answers is text
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dpo_ray
from dpo_ray.data.groups import Message
from dpo_ray.errors import InfrastructureError

from .sandbox import MAX_CHARACTERS
from .template_program import DONE, ENDS, ERROR, LIMIT, MEMORY_BYTES, OUT_OF_MEMORY, REPLY, REQUEST, TEXT_SECONDS

WAIT_SECONDS = 60.0
"""If the process gives no answer within this wall-clock time, it is killed. The limit of CPU time does not stop a
template that waits, but this one does."""

REQUEST_BYTES = 2**18  # of groups that are sent at once
_PROGRAM = "dpo_ray.data.tokenizing.template_program"
_KEPT = ("LD_LIBRARY_PATH", "PYTHONHOME")  # without which some Pythons do not start; nothing else is passed on


class Asked(NamedTuple):
    """The texts of one group to render: the index of the template, variables of the group, and the conversation of each text."""

    template: int
    variables: Mapping[str, Any]
    conversations: Sequence[tuple[Sequence[Message], bool]]  # messages, add_generation_prompt


class Answer(NamedTuple):
    """The rendered texts of a group, up to the first text that failed.

    `end` is DONE if none failed. Otherwise it is the reason: LIMIT (a limit was exceeded), ERROR (the template raised an
    error) or INVALID (the template is not valid).
    """

    texts: list[str]
    end: str = DONE
    detail: str = ""


class TemplateProcess:
    """A context manager that holds the process. The process starts when it is needed, and again if a text has ended it.

    CPU time is limited for each text, so that no valid row is rejected because the machine is busy. Memory is limited for
    the process, but macOS does not enforce this limit. The process gets no environment variables except those that Python
    needs. It ends when its parent ends, or at the latest when the text that is being rendered reaches its limit.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._one_by_one = False

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if it was started."""
        with self._lock:
            self._end()

    def fault(self, template: str, date: datetime.date) -> str:
        """Compile a template. Return the reason why it cannot be compiled, or "" if it can.

        Raises:
            InfrastructureError: the process does not start.
        """
        (answer,) = self.render((template,), date, {}, [Asked(0, {}, ())])
        return f"compiling it {answer.detail}" if answer.end == LIMIT else answer.detail

    def render(
        self, templates: Sequence[str], date: datetime.date, shared: Mapping[str, Any], groups: Sequence[Asked]
    ) -> list[Answer]:
        """Render the first groups, at least one, and return their answers.

        Further groups are rendered if they fit into the same request. After a group that exceeds a limit, none is rendered.

        Args:
            date: the date that `strftime_now` formats in a template.
            shared: variables that all groups get.

        Raises:
            InfrastructureError: the process does not start.
        """
        packed = _packed(groups[:1] if self._one_by_one else groups)
        if not packed:
            return [Answer([], ERROR, "a value of the row cannot be passed to a template")]
        with self._lock:
            try:
                return self._answers((tuple(templates), date, shared, packed), groups[: len(packed)])
            except _Ended as ended:
                if len(packed) == 1:
                    return [Answer([], LIMIT, str(ended))]
            except BaseException:
                self._end()  # what it has not answered yet would be taken for the answer to the next request
                raise
            # One of several groups has ended it, which is not known: from now on they are sent one by one.
        self._one_by_one = True
        return self.render(templates, date, shared, groups[:1])

    def _answers(self, request: tuple[Any, ...], groups: Sequence[Asked]) -> list[Answer]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._start()
        data = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
        try:
            self._channel.sendall(REQUEST.pack(len(data)) + data)
            return self._reply(groups)
        except (OSError, EOFError, ValueError, TypeError, LookupError) as error:  # OSError includes timeouts
            raise _Ended(self._cause(error)) from None

    def _reply(self, groups: Sequence[Asked]) -> list[Answer]:
        """Read a reply.

        Raises:
            EOFError: the process has ended.
            ValueError, TypeError, LookupError: the process wrote something else than a reply.
        """
        head_bytes, body_bytes = REPLY.unpack(self._read(REPLY.size))
        counts = [1 + len(group.conversations) for group in groups]
        # a head has a word and a few digits; a body ends with the group in which it exceeds MAX_CHARACTERS
        if head_bytes > 2 + 16 * sum(counts, len(counts)) or body_bytes > 4 * MAX_CHARACTERS * (
            1 + max(counts, default=0)
        ):
            raise ValueError("the reply is too long")
        return _parsed(self._read(head_bytes), self._read(body_bytes), counts)

    def _read(self, size_bytes: int) -> bytes:
        data = self._replies.read(size_bytes)
        if len(data) < size_bytes:
            raise EOFError
        return data

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
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(WAIT_SECONDS)
        self._replies = self._channel.makefile("rb", REQUEST_BYTES)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", "-m", _PROGRAM],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for those who wait for the texts
            )
        assert self._process.stderr is not None  # noqa: S101 - it is a pipe
        with self._process.stderr as said:
            try:
                self._reply([])
            except (OSError, EOFError, ValueError):
                self._process.kill()
                lines = said.read().decode("utf-8", "replace").strip().splitlines()
                raise InfrastructureError(
                    f"the process that renders chat templates does not start: {lines[-1] if lines else 'it wrote no message'}",
                    where=sys.executable,
                    fix=f"run `{sys.executable} -m {_PROGRAM}` to find the cause",
                ) from None

    def _end(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._replies.close()
            self._channel.close()
            self._process = None


def _environment() -> dict[str, str]:
    """Return the environment variables of the process: the paths of modules, and nothing that could be secret."""
    path = [os.path.abspath(place) for place in (*sys.path, Path(dpo_ray.__file__).parents[1])]
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    # A value of a Parquet row can be one of pandas, which would start threads; they need memory.
    return {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **kept}


class _Ended(Exception):
    """Raised if the process ended, or was killed, before it answered."""


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


def _parsed(head: bytes, body: bytes, counts: Sequence[int]) -> list[Answer]:
    """Parse a reply. A template may have taken control of the process that wrote the reply, so every value is checked.

    Raises:
        ValueError, TypeError, LookupError: `head` and `body` are not a reply.
    """
    heads, text = json.loads(head), body.decode("utf-8", "surrogatepass")
    answers, begin = [], 0
    for (end, *lengths), count in zip(heads, counts, strict=False):
        if end not in ENDS or not 1 <= len(lengths) <= count:
            raise ValueError("the reply has no valid answer to a group")
        texts: list[str] = []  # the detail, and then the texts
        for length in lengths:
            follows_first = length < 0
            size = -length - 1 if follows_first else length
            piece = text[begin : begin + size]
            texts.append(texts[1] + piece if follows_first else piece)
            begin += size
        answers.append(Answer(texts[1:], end, texts[0]))
    if counts and not answers:
        raise ValueError("the reply has no answers")
    return answers
