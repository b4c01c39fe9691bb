"""An OpenAI-compatible endpoint on loopback that answers by a rule of the test's, errs as real ones do, and counts its calls."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}


@dataclass(frozen=True)
class Call:
    """What one request asked, taken from between its tags."""

    parts: tuple[tuple[str, str], ...]
    body: str

    def part(self, name: str) -> str:
        return dict(self.parts)[name]


@dataclass(frozen=True)
class Reply:
    """What the endpoint does with a call: the defaults are those of a good answer."""

    content: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None  # in the place of a chat completion
    after_seconds: float = 0.0
    drop: bool = False  # close the connection without an answer
    cut: bool = False  # close it in the middle of the answer
    usage: dict[str, int] | None = field(default_factory=lambda: dict(USAGE))


Rule = Callable[[Call, int], Reply]
"""From a call, and how many of the same content came before, to what the endpoint does."""


class MadeEndpoint:
    """The calls that came, and those that were answered well; by content."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.calls: list[Call] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.most_open = self._open = 0
        self._lock = threading.Lock()
        self.base_url = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"])).decode()
        text = json.loads(body)["messages"][-1]["content"]
        parts = re.findall(r"<(?P<nonce>[0-9a-f]{16})-(\w+)>\n(.*?)\n</(?P=nonce)-\2>", text, re.DOTALL)
        call = Call(tuple((name, value) for _, name, value in parts), body)
        with self._lock:
            earlier = self.asked[body]
            self.asked[body] += 1
            self.calls.append(call)
            self.times.append(time.monotonic())
            self.keys.add(handler.headers.get("authorization", ""))
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        try:
            self._reply(handler, body, self.rule(call, earlier))
        finally:
            with self._lock:
                self._open -= 1

    def _reply(self, handler: BaseHTTPRequestHandler, request: str, reply: Reply) -> None:
        time.sleep(reply.after_seconds)
        if reply.drop:
            handler.close_connection = True
            return
        completion: dict[str, Any] = {
            "id": "made",
            "object": "chat.completion",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": reply.content}, "finish_reason": "stop"}
            ],
            "usage": reply.usage,
        }
        data = (json.dumps(completion) if reply.body is None else reply.body).encode()
        handler.send_response(reply.status)
        for name, value in (
            {"content-type": "application/json", "content-length": str(len(data))} | reply.headers
        ).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if reply.cut else data)
        handler.close_connection = handler.close_connection or reply.cut
        if reply.status == 200 and not reply.cut and reply.body is None:
            with self._lock:
                self.answered[request] += 1


@contextmanager
def made_endpoint(rule: Rule) -> Iterator[MadeEndpoint]:
    """Serve until the end of the block."""
    endpoint = MadeEndpoint(rule)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            if self.path != "/v1/chat/completions":
                self.send_error(404)
                return
            try:
                endpoint.handle(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the judge waited no longer, or was killed

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    endpoint.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def longer_is_better(call: Call, earlier: int) -> Reply:
    """Prefer the longer completion, in whichever order; of one completion, score its length."""
    names = dict(call.parts)
    if "answer" in names:
        return Reply(json.dumps({"score": min(10, max(1, len(names["answer"])))}))
    first, second = len(names["first"]), len(names["second"])
    return Reply(json.dumps({"better": "first" if first > second else "second" if second > first else "tie"}))
