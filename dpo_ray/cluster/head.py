"""The watch over Ray's head node, which ends a run with an error if the head is lost.

Without it, Ray's own code ends the driver after a minute with exit code 1 and no message.
"""

from __future__ import annotations

import _thread
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from dpo_ray.errors import HeadLostError

PING_SECONDS = 5.0
LOCAL_PATIENCE_SECONDS, CLUSTER_PATIENCE_SECONDS = 10.0, 45.0  # a cluster's head may be started again; Ray waits for 60
LAST_WORDS_SECONDS = 15.0  # for the driver's main thread to end by itself, once it is interrupted


@contextmanager
def watched_head(address: str) -> Iterator[None]:
    """Interrupt the code in the `with` block if Ray's head no longer answers.

    If the main thread does not react, because it waits in Ray's own code, print the error and end the process.

    Raises:
        HeadLostError: the head did not answer for so long that Ray would soon end this process.
    """
    place = ray.get_runtime_context().gcs_address
    patience_seconds = LOCAL_PATIENCE_SECONDS if address == "local" else CLUSTER_PATIENCE_SECONDS
    error = HeadLostError(
        f"Ray's head does not answer any more: its process (gcs_server) has ended, or {place} cannot be reached",
        where=f"ray.address={address}",
        fix="find out why (memory, a lost machine), start the cluster if it is one, and run the same command again: it "
        "continues from what was committed",
    )
    ended, lost = threading.Event(), threading.Event()

    def watch() -> None:
        silent_seconds = 0.0
        while not ended.wait(PING_SECONDS):
            silent_seconds = 0.0 if _answers(place) else silent_seconds + PING_SECONDS
            if silent_seconds >= patience_seconds:
                lost.set()
                _thread.interrupt_main()
                if not ended.wait(LAST_WORDS_SECONDS):  # the main thread waits in Ray's own code
                    print(f"error: {error}", file=sys.stderr, flush=True)
                    os._exit(error.exit_code)
                return

    threading.Thread(target=watch, name="watch-head", daemon=True).start()
    try:
        yield
    except BaseException as found:
        if lost.is_set():
            raise error from found
        raise
    finally:
        ended.set()


def _answers(place: str) -> bool:
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PING_SECONDS).close()
    except OSError:
        return False
    return True
