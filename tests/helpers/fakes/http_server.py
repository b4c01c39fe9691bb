"""A real HTTP server on this machine, which answers as a cluster's dashboard, or as anything else, does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """What the server answers, by path, and what it was asked: (path, headers)."""

    url: str
    pages: dict[str, tuple[int, str]]
    token: str | None = None
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)


@contextmanager
def served(pages: dict[str, Any], token: str | None = None) -> Iterator[Served]:
    """Serve `pages`: text as it is, (status, text), or what becomes JSON. With a token, refuse as Ray's dashboard does."""
    ready = {path: page if isinstance(page, tuple) else (200, _text(page)) for path, page in pages.items()}
    made = Served("", ready, token)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append((self.path, dict(self.headers)))
            given = self.headers.get("Authorization")
            if made.token is not None and given is None:
                self.answer(401, "Unauthorized: Missing authentication token")
            elif made.token is not None and given != f"Bearer {made.token}":
                self.answer(403, "Forbidden: Invalid authentication token")
            else:
                self.answer(*made.pages.get(self.path, (404, "not here")))

        do_POST = do_GET

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()


def _text(page: Any) -> str:
    return page if isinstance(page, str) else json.dumps(page)
