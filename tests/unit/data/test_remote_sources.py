"""Shards at a URL and at the hub, served from here: listed, told apart by their content, and read like local ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import pytest
from huggingface_hub import HfFileSystem

from dpo_ray.data.sources import shard_digest
from dpo_ray.errors import ConfigError, InfrastructureError
from tests.helpers.shards import FILES, ROWS, rows_in, shards_of

REVISIONS = {
    "a" * 40: {"data/a.jsonl": "1" * 40, "data/a.csv": "2" * 40},
    "b" * 40: {"data/a.jsonl": "1" * 40, "data/a.csv": "3" * 40},
}


@contextmanager
def served(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def send_range(handler: BaseHTTPRequestHandler, data: bytes, asked: str) -> None:
    first, last = asked.removeprefix("bytes=").split("-")
    part = data[int(first) : int(last) + 1 if last else None]
    handler.send_response(206)
    handler.send_header("Content-Length", str(len(part)))
    handler.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
    handler.end_headers()
    handler.wfile.write(part)


class Handler(SimpleHTTPRequestHandler):
    """A web server that gives a tag, and ranges of bytes unless told otherwise."""

    ranges = True

    def log_message(self, *_: Any) -> None: ...

    def end_headers(self) -> None:
        self.send_header("ETag", '"of-today"')
        super().end_headers()

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        if asked is None or not self.ranges:
            return super().do_GET()
        return send_range(self, Path(self.translate_path(self.path)).read_bytes(), asked)


@pytest.fixture(params=[True, False], ids=["ranges", "no-ranges"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, bool]]:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    handler = type("_Handler", (Handler,), {"ranges": request.param})
    with served(partial(handler, directory=str(tmp_path))) as home:
        yield home, request.param


def test_files_at_a_url_are_read_like_local_ones(web: tuple[str, bool]):
    home, _ = web
    for name in ("a.jsonl", "list.json", "a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.tsv"):
        (shard,) = shards_of(f"{home}/{name}?signature=abc/def.txt&part=[1]")
        assert (shard.name, rows_in(shard)) == (name, ROWS)


def test_parquet_at_a_url_needs_a_server_of_ranges(web: tuple[str, bool]):
    home, ranges = web
    for name in ("a.parquet", "file.arrow"):
        (shard,) = shards_of(f"{home}/{name}")
        if ranges:
            assert rows_in(shard) == ROWS
        else:
            with pytest.raises(InfrastructureError, match="range"):
                rows_in(shard)


def test_a_url_is_told_without_its_signature(web: tuple[str, bool]):
    home, _ = web
    first, second = (shards_of(f"{home}/a.jsonl?signature={s}")[0] for s in ("secret1", "secret2"))
    assert shard_digest(first) == shard_digest(second)
    with pytest.raises(ConfigError) as caught:
        shards_of(f"{home}/gone.jsonl?signature=secret")
    assert "gone.jsonl" in str(caught.value)
    assert "secret" not in str(caught.value)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as lists and reads the files of one data set: two revisions, of which one file differs."""

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path:
            return send_range(self, FILES[path.rpartition("/")[2]], self.headers["Range"])
        revision, _, directory = path.partition("/tree/")[2].partition("/")
        answer: Any = {"id": "org/name", "sha": path.rpartition("/")[2]}
        if directory:
            files = REVISIONS[revision].items()
            answer = [
                {"type": "file", "path": name, "size": len(FILES[Path(name).name]), "oid": oid} for name, oid in files
            ]
        elif revision:
            answer = [{"type": "directory", "path": "data", "oid": "0" * 40}]
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def test_files_of_the_hub_are_known_by_their_content(monkeypatch: pytest.MonkeyPatch):
    with served(Hub) as endpoint:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint, "token": False})
        HfFileSystem.clear_instance_cache()
        first, second = (shards_of(f"hf://datasets/org/name@{revision}/data") for revision in REVISIONS)
        assert [s.name for s in first] == ["a.csv", "a.jsonl"]
        assert [rows_in(s) for s in first] == [ROWS, ROWS]
        assert [shard_digest(a) == shard_digest(b) for a, b in zip(first, second, strict=True)] == [False, True]
        (one,) = shards_of(f"hf://datasets/org/name@{'a' * 40}/data/*.jsonl")
        assert shard_digest(one) == shard_digest(first[1])
    HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("uri", "module", "extra"),
    [("gs://bucket/a.jsonl", "gcsfs", "dpo-ray[gs]"), ("abfs://container/a.jsonl", "adlfs", "package")],
)
def test_missing_package_of_a_file_system_is_named(uri: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    with pytest.raises(InfrastructureError, match="is missing") as caught:
        shards_of(uri)
    assert extra in caught.value.fix
