"""Follow what a job's driver prints, until the job has ended, over connections that may break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import cast

import aiohttp
from ray.job_submission import JobSubmissionClient

from dpo_ray.errors import InfrastructureError

from .jobs import Job, look
from .server import answers

SILENCE_SECONDS = 60.0  # then the connection may be dead without a word, and a new one is made
RECONNECT_SECONDS = 2.0
LOST_SECONDS = 300.0  # of a cluster that does not answer at all


def printed(client: JobSubmissionClient, job: str) -> str:
    """Return what a job's driver has printed so far.

    Raises:
        ConfigError: the cluster knows no such job.
        InfrastructureError: the cluster does not answer.
    """
    with answers(client.get_address(), job):
        return client.get_job_logs(job)


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> Job:
    """Write what a job's driver prints, each character once, and return the job when it has ended.

    Every connection begins at the log's first character, so as many are passed over as have been written. The end is the
    job's own: a connection that closes says nothing about it.

    Raises:
        ConfigError: the cluster knows no such job.
        InfrastructureError: the cluster has not answered for LOST_SECONDS.
    """
    return asyncio.run(_follow(client, job, write))


async def _follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> Job:
    written, loop = 0, asyncio.get_running_loop()
    found, answered = look(client, job), loop.time()
    while not found.is_over:
        written = await _one_connection(client, job, write, written)
        try:
            found, answered = look(client, job), loop.time()
        except InfrastructureError:
            if loop.time() - answered > LOST_SECONDS:
                raise
        if not found.is_over:
            await asyncio.sleep(RECONNECT_SECONDS)
    write(printed(client, job)[written:])  # the last lines, which a connection may have lost
    return found


async def _one_connection(client: JobSubmissionClient, job: str, write: Callable[[str], None], written: int) -> int:
    """Write what is new, until the connection ends or has been silent for long; returns the characters written so far."""
    passed, lines = 0, cast(AsyncGenerator[str, None], client.tail_job_logs(job))
    try:
        while True:
            text = await asyncio.wait_for(anext(lines), SILENCE_SECONDS)
            new = text[max(0, written - passed) :]
            passed += len(text)
            if new:
                write(new)
                written = max(written, passed)
    except (StopAsyncIteration, TimeoutError, aiohttp.ClientError, RuntimeError, OSError):
        return written
    finally:
        await lines.aclose()
