"""The output of a job's driver. It is followed until the job has ended, even if connections break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import cast

import aiohttp
from ray.job_submission import JobSubmissionClient

from dpo_ray.errors import InfrastructureError

from .jobs import Job, look
from .server import answers

SILENCE_SECONDS = 60.0  # after this time the connection may be dead, and a new one is opened
RECONNECT_SECONDS = 2.0
LOST_SECONDS = 300.0  # after which a cluster that does not answer counts as lost


def printed(client: JobSubmissionClient, job: str) -> str:
    """Return the output of a job's driver so far.

    Raises:
        ConfigError: the cluster has no such job.
        InfrastructureError: the cluster does not answer.
    """
    with answers(client.get_address(), job):
        return client.get_job_logs(job)


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> Job:
    """Write the output of a job's driver, every character once, until the job has ended; return the job.

    Every connection starts at the beginning of the log, so characters that were already written are skipped. The job has
    ended when its state says so; a closed connection does not mean that it has ended.

    Raises:
        ConfigError: the cluster has no such job.
        InfrastructureError: the cluster has not answered for LOST_SECONDS.
    """
    return asyncio.run(_follow(client, job, write))


async def _follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> Job:
    written, loop = 0, asyncio.get_running_loop()
    state, answered = look(client, job), loop.time()
    while not state.is_over:
        written = await _one_connection(client, job, write, written)
        try:
            state, answered = look(client, job), loop.time()
        except InfrastructureError:
            if loop.time() - answered > LOST_SECONDS:
                raise
        if not state.is_over:
            await asyncio.sleep(RECONNECT_SECONDS)
    write(printed(client, job)[written:])  # the last lines, which a connection may have lost
    return state


async def _one_connection(client: JobSubmissionClient, job: str, write: Callable[[str], None], written: int) -> int:
    """Open one connection, and write new output until the connection ends or is silent for too long.

    `written` is the number of characters that were written before. Return the number of characters written until now.
    """
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
