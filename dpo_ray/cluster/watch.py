"""The watch over two processes of Ray, which ends a run with an error if one of them is lost.

The driver needs the process of Ray's head, and the raylet of the driver's machine. Without this watch, Ray's own code
ends the driver with exit code 1 and no message: a minute after the head is lost, or as soon as it needs a raylet that
has ended.
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

from dpo_ray.errors import RayLostError

RAYLET_SECONDS = 0.5  # between two looks at the raylet
PINGS = 10  # the head is asked at every tenth look
PING_SECONDS = RAYLET_SECONDS * PINGS
LOCAL_PATIENCE_SECONDS, CLUSTER_PATIENCE_SECONDS = 10.0, 45.0  # a cluster's head may be started again; Ray waits for 60
LAST_WORDS_SECONDS = 15.0  # for the driver's main thread to end by itself, once it is interrupted
LAST_WORDS_WITHOUT_RAYLET_SECONDS = 3.0  # Ray's own code may end the process at any moment
AGAIN = "run the same command again: it continues from what was committed"


@contextmanager
def watched_ray(address: str) -> Iterator[None]:
    """Interrupt the code in the `with` block if Ray's head no longer answers, or if the raylet of this machine has ended.

    If the main thread does not react, because it waits in Ray's own code, print the error and end the process.

    Raises:
        RayLostError: the head or the raylet is lost, so Ray would soon end this process.
    """
    head, raylet = ray.get_runtime_context().gcs_address, _raylet_address()
    patience_seconds = LOCAL_PATIENCE_SECONDS if address == "local" else CLUSTER_PATIENCE_SECONDS
    ended, lost = threading.Event(), list[RayLostError]()

    def end(error: RayLostError, last_words_seconds: float) -> None:
        lost.append(error)
        _thread.interrupt_main()
        if not ended.wait(last_words_seconds):  # the main thread waits in Ray's own code
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)

    def watch() -> None:
        silent_seconds, looks = 0.0, 0
        while not ended.wait(RAYLET_SECONDS):
            if raylet and _refuses(raylet):
                return end(_raylet_error(address), LAST_WORDS_WITHOUT_RAYLET_SECONDS)
            looks += 1
            if looks % PINGS:
                continue
            silent_seconds = 0.0 if _answers(head) else silent_seconds + PING_SECONDS
            if silent_seconds >= patience_seconds:
                return end(_head_error(address, head), LAST_WORDS_SECONDS)

    threading.Thread(target=watch, name="watch-ray", daemon=True).start()
    try:
        yield
    except BaseException as found:
        if lost:
            raise lost[0] from found
        raise
    finally:
        ended.set()


def _head_error(address: str, head: str) -> RayLostError:
    return RayLostError(
        f"Ray's head does not answer any more: its process (gcs_server) has ended, or {head} cannot be reached",
        where=f"ray.address={address}",
        fix=f"find out why (too little memory, a lost machine), restart the cluster if Ray is not local, and {AGAIN}",
    )


def _raylet_error(address: str) -> RayLostError:
    return RayLostError(
        "Ray's process on this machine (raylet) has ended",
        where=f"ray.address={address}",
        fix=f"find out why (usually too little memory, see dmesg), start Ray again if this machine is part of a cluster, "
        f"and {AGAIN}",
    )


def _raylet_address() -> str:
    """Return the address at which the raylet of the driver's node listens, or "" if Ray does not list this node."""
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["NodeID"] == here]
    return f"{nodes[0]['NodeManagerAddress']}:{nodes[0]['NodeManagerPort']}" if nodes else ""


def _answers(place: str) -> bool:
    try:
        _connect(place)
    except OSError:
        return False
    return True


def _refuses(place: str) -> bool:
    """Return whether the address refuses connections because no process listens there.

    A machine or network that is only slow does not refuse.
    """
    try:
        _connect(place)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _connect(place: str) -> None:
    host, _, port = place.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=PING_SECONDS).close()
