"""The program that compiles and renders chat templates for a `TemplateProcess`, within limits that it sets for itself.

The kernel enforces the limits, so no template can exceed them: neither by a long call of C code, nor by a constant
expression, which Jinja evaluates while it compiles. If a text exceeds its CPU time, the signal SIGPROF ends this process.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import json
import os
import pickle  # noqa: TID251 - what is read here was written by the process that started this one
import resource
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Any

import jinja2

from dpo_ray.data.tokenizing.sandbox import MAX_CHARACTERS, TextTooLong, compile_template

TEXT_SECONDS = 1.0
"""Limit of the CPU time to compile a template, or to render one text. Long conversations need a thousandth of it."""

MEMORY_BYTES = 2**30
OUT_OF_MEMORY = 3  # exit code
DETAIL_CHARACTERS = 200

DONE, LIMIT, ERROR, INVALID = ENDS = ("done", "limit", "error", "invalid")
REQUEST, REPLY = struct.Struct(">Q"), struct.Struct(">QQ")  # the sizes of what follows

_compiled = functools.lru_cache(maxsize=8)(compile_template)


def main() -> None:
    """Answer the requests that arrive on standard input, which is a socket. Return when the other end is closed."""
    _limit_resources()
    channel = socket.socket(fileno=0)
    channel.sendall(_packed([], []))  # ready
    os.dup2(1, 2)  # nobody reads warnings about a template
    gc.freeze()
    gc.set_threshold(50_000)  # a request makes many objects, and few cycles
    with channel.makefile("rb") as requests:
        while head := requests.read(REQUEST.size):
            try:
                channel.sendall(_reply(requests.read(REQUEST.unpack(head)[0])))
            except MemoryError:
                os._exit(OUT_OF_MEMORY)


def _limit_resources() -> None:
    """Limit the memory of this process, and forbid files and core dumps. The system may ignore or refuse some of the limits."""
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])


def _reply(request: bytes) -> bytes:
    """Render the groups of a request, and return the reply.

    Stop after a group that exceeds a limit, or when the reply is longer than MAX_CHARACTERS.
    """
    templates, date, shared, groups = pickle.loads(request)  # noqa: S301 - as above
    heads: list[list[Any]] = []
    texts: list[str] = []
    characters = 0
    for packed in groups:
        number, variables, conversations = pickle.loads(packed)  # noqa: S301 - as above
        rendered: list[str] = []
        end, detail = _render(templates[number], date, {**shared, **variables}, conversations, rendered)
        signal.setitimer(signal.ITIMER_PROF, 0)
        lengths = [len(text) for text in rendered]
        for i, text in enumerate(rendered[1:], start=1):
            if text.startswith(rendered[0]):  # the prompt is sent once
                rendered[i] = text[lengths[0] :]
                lengths[i] = lengths[0] - lengths[i] - 1
        heads.append([end, len(detail), *lengths])
        texts += (detail, *rendered)
        characters += len(detail) + sum(map(len, rendered))
        if end == LIMIT or characters > MAX_CHARACTERS:
            break
    return _packed(heads, texts)


def _render(
    template: str, date: datetime.date, variables: dict[str, Any], conversations: Sequence[Any], rendered: list[str]
) -> tuple[str, str]:
    """Append the texts that can be rendered to `rendered`. Return how the group ended (one of ENDS), and a detail."""
    try:
        signal.setitimer(signal.ITIMER_PROF, TEXT_SECONDS)
        try:
            render = _compiled(template, date)
        except jinja2.TemplateSyntaxError as error:
            return INVALID, f"{error.message} (line {error.lineno})"[:DETAIL_CHARACTERS]
        for variables["messages"], variables["add_generation_prompt"] in conversations:
            signal.setitimer(signal.ITIMER_PROF, TEXT_SECONDS)
            rendered.append(render(variables))
    except TextTooLong as error:
        return LIMIT, str(error)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, and a row can make it raise anything
        return ERROR, f"{type(error).__name__}: {error}"[:DETAIL_CHARACTERS]
    return DONE, ""


def _packed(heads: Sequence[Sequence[Any]], texts: Sequence[str]) -> bytes:
    """Build a reply from a head and a body. The body is all texts, one after the other.

    The head lists for each group how it ended, and the lengths (in characters) of its detail and of its rendered texts.
    A rendered text that begins with the group's first text (the prompt) is sent without this beginning. If n characters
    remain, the length in the head is -n - 1.
    """
    head, body = json.dumps(heads).encode(), "".join(texts).encode("utf-8", "surrogatepass")
    return REPLY.pack(len(head), len(body)) + head + body


if __name__ == "__main__":
    main()
