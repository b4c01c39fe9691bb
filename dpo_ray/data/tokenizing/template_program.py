"""The program that compiles and renders chat templates for a `TemplateProcess`, within limits that it sets for itself.

The kernel enforces them, so nothing that a template calls can outlive them: not one step in C code, and not a constant
expression, which Jinja computes when it compiles. A text that exceeds its CPU time ends this process (SIGPROF).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import pickle  # noqa: TID251 - what is read here was written by the process that started this one
import resource
import signal
import socket
import struct
from collections.abc import Sequence
from typing import IO, Any

import jinja2

from dpo_ray.data.tokenizing.sandbox import TextTooLong, compile_template

TEXT_SECONDS = 1.0
"""CPU time to compile a template, or to render one text: a thousand times as long as long conversations need."""

MEMORY_BYTES = 2**30
OUT_OF_MEMORY = 3  # exit code

TEXT, DONE, LIMIT, ERROR, INVALID = b"T", b"D", b"L", b"E", b"I"
REQUEST, FRAME = struct.Struct(">Q"), struct.Struct(">cI")  # the size of a request; the kind and the size of a frame
DETAIL_CHARACTERS = 200

_compiled = functools.lru_cache(maxsize=8)(compile_template)


def main() -> None:
    """Answer requests, which come on the socket that is standard input, until its other end is closed."""
    _limit_resources()
    with (
        socket.socket(fileno=os.dup(0)) as channel,
        channel.makefile("rb") as requests,
        channel.makefile("wb") as answers,
    ):
        _write(answers, DONE)  # ready
        answers.flush()
        os.dup2(1, 2)  # nobody reads warnings about a template
        while head := requests.read(REQUEST.size):
            try:
                _answer(requests.read(REQUEST.unpack(head)[0]), answers)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)


def _limit_resources() -> None:
    """Limit memory; write no file and no core dump; start no process. The system may ignore or refuse some of it."""
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])


def _answer(request: bytes, answers: IO[bytes]) -> None:
    """Answer each group of texts with a frame for each text, up to the first that fails, and one that ends the group."""
    templates, date, shared, groups = pickle.loads(request)  # noqa: S301 - as above
    for packed in groups:
        number, variables, texts = pickle.loads(packed)  # noqa: S301 - as above
        kind, detail = _rendered(templates[number], date, {**shared, **variables}, texts, answers)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, kind, detail)
        answers.flush()  # the next text may end this process
        if kind == LIMIT:
            return


def _rendered(
    template: str, date: datetime.date, variables: dict[str, Any], texts: Sequence[Any], answers: IO[bytes]
) -> tuple[bytes, str]:
    """Write the texts that can be rendered; return how the group ends, and why."""
    try:
        signal.setitimer(signal.ITIMER_PROF, TEXT_SECONDS)
        try:
            render = _compiled(template, date)
        except jinja2.TemplateSyntaxError as error:
            return INVALID, f"{error.message} (line {error.lineno})"[:DETAIL_CHARACTERS]
        for messages, add_generation_prompt in texts:
            signal.setitimer(signal.ITIMER_PROF, TEXT_SECONDS)
            text = render({**variables, "messages": messages, "add_generation_prompt": add_generation_prompt})
            _write(answers, TEXT, text)
    except TextTooLong as error:
        return LIMIT, str(error)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, and a row can make it raise anything
        return ERROR, f"{type(error).__name__}: {error}"[:DETAIL_CHARACTERS]
    return DONE, ""


def _write(answers: IO[bytes], kind: bytes, text: str = "") -> None:
    data = text.encode("utf-8", "surrogatepass")
    answers.write(FRAME.pack(kind, len(data)) + data)


if __name__ == "__main__":
    main()
