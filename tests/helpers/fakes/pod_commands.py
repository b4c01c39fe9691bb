"""The half of an API server that runs commands in pods: a WebSocket with channels, and a process of this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
STDIN, OUTPUT, ERRORS, RESULT = 0, 1, 2, 3


def run_command(handler: BaseHTTPRequestHandler, query: dict[str, list[str]], root: Path | None) -> None:
    """Answer the handshake, run the command with `root` in place of the pod's directories, and send what it writes."""
    key = handler.headers["Sec-WebSocket-Key"].encode()
    handler.send_response(101)
    handler.send_header("Upgrade", "websocket")
    handler.send_header("Connection", "Upgrade")
    handler.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key + MAGIC).digest()).decode())  # noqa: S324
    handler.send_header("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
    handler.end_headers()
    command = [_inside(word, root) for word in query["command"]]
    if command[0] == "python":
        command[0] = sys.executable
    given = query.get("stdin") == ["True"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE if given else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if given:
        threading.Thread(target=_feed, args=(handler, process), daemon=True).start()
    assert process.stdout
    assert process.stderr
    output, errors = process.stdout.read(), process.stderr.read()
    code = process.wait()
    result: dict[str, Any] = {"status": "Success"}
    if code:
        causes = [{"reason": "ExitCode", "message": str(code)}]
        result = {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}
    for channel, data in ((OUTPUT, output), (ERRORS, errors), (RESULT, json.dumps(result).encode())):
        if data:
            _send(handler, 2, bytes([channel]) + data)
    _send(handler, 8, struct.pack(">H", 1000))


def _inside(word: str, root: Path | None) -> str:
    if root is None:
        return word
    for directory in ("/tmp/ray/session_latest", "/mnt/shared"):  # noqa: S108
        word = word.replace(directory, str(root))
    return word


def _feed(handler: BaseHTTPRequestHandler, process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    while (frame := _receive(handler)) is not None:
        if frame[:1] == bytes([STDIN]):
            try:
                process.stdin.write(frame[1:])
                process.stdin.flush()
            except OSError:
                return


def _send(handler: BaseHTTPRequestHandler, code: int, payload: bytes) -> None:
    size = len(payload)
    length = struct.pack(">B", size) if size < 126 else struct.pack(">BH", 126, size) if size < 65536 else None
    handler.wfile.write(bytes([0x80 | code]) + (length or struct.pack(">BQ", 127, size)) + payload)


def _receive(handler: BaseHTTPRequestHandler) -> bytes | None:
    """Return the next frame of the client, which is masked; None at its end."""
    head = handler.rfile.read(2)
    if len(head) < 2 or head[0] & 0xF == 8:
        return None
    size = head[1] & 0x7F
    if size >= 126:
        size = int.from_bytes(handler.rfile.read(2 if size == 126 else 8), "big")
    mask = handler.rfile.read(4)
    data = handler.rfile.read(size)
    repeated = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")
