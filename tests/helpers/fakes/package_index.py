"""Make tiny wheels and serve them on loopback as a package index does, as fast or as badly as a test asks for."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

PIECE_BYTES = 4096


@dataclass
class Index:
    """One index: a directory of wheels, what it answers badly, and what it was asked for."""

    wheels: Path
    port: int = 0
    lacking: set[str] = field(default_factory=set)  # files that its pages list, and that it does not have
    status_of_all: int = 0  # answer everything with this status, where it is not 0
    seconds_a_piece: float = 0.0
    asked: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/simple"

    @property
    def torch_page(self) -> str:
        """Return the address of a page with files of torch, as PyTorch's own index has one."""
        return f"http://127.0.0.1:{self.port}/whl/cpu/torch/"

    @property
    def downloaded(self) -> list[str]:
        """Return the wheels that were asked for, in order."""
        return [path.rsplit("/", 1)[-1] for path in self.asked if path.endswith(".whl")]


@contextmanager
def served(index: Index) -> Iterator[Index]:
    """Serve an index on a port of loopback; on the one that it had before, where it had one."""
    server = ThreadingHTTPServer(("127.0.0.1", index.port), partial(_Answer, index))
    server.daemon_threads = True
    index.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()


class _Answer(BaseHTTPRequestHandler):
    def __init__(self, index: Index, *arguments) -> None:
        self.index = index
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = unquote(self.path)
        self.index.asked.append(path)
        name = path.rstrip("/").rsplit("/", 1)[-1]
        if self.index.status_of_all:
            return self._send(self.index.status_of_all, b"no")
        if path.startswith(("/simple/", "/whl/cpu/")):
            page = project_page(self.index.wheels, name)
            return self._send(200 if page else 404, page.encode(), "text/html")
        file = self.index.wheels / name
        if name in self.index.lacking or not file.exists():
            return self._send(404, b"not here")
        return self._send(200, file.read_bytes())

    def _send(self, status: int, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # the installer was killed, or has had enough
            for start in range(0, len(body), PIECE_BYTES):
                self.wfile.write(body[start : start + PIECE_BYTES])
                if self.index.seconds_a_piece and kind != "text/html":
                    time.sleep(self.index.seconds_a_piece)

    def log_message(self, *_: object) -> None:
        """Write nothing: a test's output is its own."""


def project_page(wheels: Path, project: str) -> str:
    """Return the page of a project in the layout of PEP 503, or nothing where no wheel is of it."""
    files = sorted(file.name for file in wheels.glob("*.whl") if _project(file.name) == project)
    links = [f'<a href="/files/{name.replace("+", "%2B")}" data-core-metadata="true">{name}</a><br/>' for name in files]
    return f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>" if links else ""


def _project(wheel: str) -> str:
    return wheel.split("-")[0].replace("_", "-").lower()


def make_wheel(
    wheels: Path,
    project: str,
    version: str = "1.0",
    requires: tuple[str, ...] = (),
    size_bytes: int = 0,
    script: str = "",
) -> Path:
    """Write a wheel of a package that holds its own version, and the metadata beside it (PEP 658)."""
    name = project.replace("-", "_")
    about = f"{name}-{version}.dist-info"
    metadata = "".join(
        f"{line}\n"
        for line in (
            "Metadata-Version: 2.1",
            f"Name: {project}",
            f"Version: {version}",
            *(f"Requires-Dist: {requirement}" for requirement in requires),
        )
    )
    contents = {f"{name}-{version}.data/scripts/{name}": script} if script else {}
    contents |= {
        f"{name}/__init__.py": f"__version__ = '{version}'\n",
        f"{name}/weight.bin": "0" * size_bytes,
        f"{about}/METADATA": metadata,
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_digest(text)},{len(text)}\n" for path, text in contents.items())
    wheels.mkdir(parents=True, exist_ok=True)
    file = wheels / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:  # stored, not deflated: its size is that of its contents
        for path, text in contents.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = 0o100755 << 16  # scripts must be executable files, and modules may
            archive.writestr(entry, text)
        archive.writestr(f"{about}/RECORD", record + f"{about}/RECORD,,\n")
    file.with_name(file.name + ".metadata").write_text(metadata)
    return file


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
