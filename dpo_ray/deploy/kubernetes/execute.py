"""Commands in the containers of pods, through the API server: no port is forwarded, and no NetworkPolicy is in the way."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

from .client import ANSWER_SECONDS, Cluster, message_of

OUTPUT, ERRORS, RESULT = 1, 2, 3  # the channels of the connection
CHUNK_BYTES = 256 << 10  # of what is written to a command; API servers refuse frames that are much larger


class Executed(NamedTuple):
    """What a command wrote, and its exit code; None if it could not be run or the connection was lost."""

    code: int | None
    output: bytes
    errors: str


def execute(
    cluster: Cluster,
    namespace: str,
    pod: str,
    container: str,
    command: list[str],
    *,
    given: bytes | None = None,
    seconds: float = 2 * ANSWER_SECONDS,
) -> Executed:
    """Run a command in a container; `given` is written to its standard input, which stays open.

    A failure is returned and not raised: the caller knows whether it may be repeated.
    """
    import websocket
    from kubernetes import client, stream

    websocket.setdefaulttimeout(ANSWER_SECONDS)  # otherwise a lost server is waited for without end
    api = client.CoreV1Api(cluster.client())
    try:
        connection = stream.stream(
            api.connect_get_namespaced_pod_exec,
            pod,
            namespace,
            container=container,
            command=command,
            stdin=given is not None,
            stdout=True,
            stderr=True,
            tty=False,
            binary=True,
            _preload_content=False,
        )
    except client.ApiException as error:
        return Executed(None, b"", _refusal(str(error.reason)))
    try:
        return _run(connection, given, seconds)
    except (OSError, websocket.WebSocketException, client.ApiException) as error:
        return Executed(None, b"", f"the connection was lost: {type(error).__name__}")
    finally:
        connection.close(timeout=0)  # do not wait for the other side to agree


def _run(connection: Any, given: bytes | None, seconds: float) -> Executed:
    output, errors, until = bytearray(), bytearray(), time.monotonic() + seconds
    for start in range(0, len(given or b""), CHUNK_BYTES):
        connection.write_stdin((given or b"")[start : start + CHUNK_BYTES])
    while connection.is_open() and time.monotonic() < until:
        connection.update(timeout=max(0.0, until - time.monotonic()))
    output += connection.read_channel(OUTPUT) or b""
    errors += connection.read_channel(ERRORS) or b""
    text = errors.decode(errors="replace").strip()
    if connection.is_open():
        return Executed(None, bytes(output), text or f"it has not ended within {seconds:g} s")
    return _ended(connection, bytes(output), text)


def _ended(connection: Any, output: bytes, text: str) -> Executed:
    import yaml

    result = yaml.safe_load((connection.read_channel(RESULT) or b"").decode(errors="replace") or "null") or {}
    if result.get("status") == "Success":
        return Executed(0, output, text)
    causes = (result.get("details") or {}).get("causes") or []
    code = next((int(c["message"]) for c in causes if c.get("reason") == "ExitCode"), None)
    return Executed(code, output, text or result.get("message") or "the connection was lost")


def _refusal(reason: str) -> str:
    """Return in short why the API server did not open the connection."""
    status = re.search(r"Handshake status (\d+) ([\w ]+)", reason)
    if status and '"message"' in reason:
        return f"{status[1]}: {message_of(reason)}"
    return f"{status[1]} {status[2].strip()}" if status else reason.splitlines()[0][:200] if reason else "no connection"
