"""Shards: what a recipe's sources name, file by file, and the rows in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.artifacts.digest_cache import cached_file_sha256
from dpo_ray.config.data import Columns, FilesSource, HubSource, RowFormat, Source, SyntheticSource
from dpo_ray.errors import ConfigError, DataError, InfrastructureError

from . import synthetic
from .admission import Rejected

SYNTHETIC_VERSION = 1  # raised when the grammar changes, so that artifacts made of it become stale
MAX_ROW_BYTES = 16 << 20
JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
KNOWN_SUFFIXES = (*JSON_LINES, ".parquet", ".arrow")

Kind = Literal["jsonl", "parquet", "arrow", "hub", "synthetic"]


@dataclass(frozen=True)
class Shard:
    """One file (or data set) of a source; `index` is its place among the split's shards."""

    split: Literal["train", "eval"]
    index: int
    name: str  # what reports call it
    kind: Kind
    location: str  # path or URI; for hub and synthetic data their parameters as JSON
    row_format: RowFormat
    columns: Columns


def list_shards(split: Literal["train", "eval"], sources: Sequence[Source]) -> list[Shard]:
    """Name all shards of a split in a stable order: sources as given, files of each sorted by path.

    Raises:
        ConfigError: a path or glob that matches nothing, or a file whose kind is not known.
    """
    found: list[tuple[str, Kind, str, RowFormat, Columns]] = []
    for source in sources:
        match source:
            case FilesSource():
                for path in [source.path] if isinstance(source.path, str) else source.path:
                    found += [
                        (PurePosixPath(f).name, _kind(f), f, source.format, source.columns)
                        for f in _expand(path, split)
                    ]
            case HubSource():
                what = {
                    "name": source.name,
                    "subset": source.subset,
                    "split": source.split,
                    "revision": source.revision,
                }
                found.append((f"{source.name}[{source.split}]", "hub", json.dumps(what), source.format, source.columns))
            case SyntheticSource():
                what = {"pairs": source.pairs, "seed": source.seed}
                found.append(("synthetic", "synthetic", json.dumps(what), "text", Columns()))
    return [Shard(split, i, *shard) for i, shard in enumerate(found)]


def _expand(path: str, split: str) -> list[str]:
    where = f"data.{split}={path}"
    try:
        fs, root = fsspec.core.url_to_fs(path)
        protocol = "" if "file" in _protocols(fs) else path.split("://", 1)[0] + "://"
        if fs.isdir(root):
            matched = [
                f
                for f in fs.find(root)
                if f.endswith(KNOWN_SUFFIXES) and not PurePosixPath(f).name.startswith((".", "_"))
            ]
        else:
            matched = [f for f in fs.glob(root) if fs.isfile(f)]
    except ImportError as error:
        raise InfrastructureError(
            str(error), where=where, fix="install the extra: pip install 'dpo-ray[s3]' or 'dpo-ray[gs]'"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be listed: {error}", where=where, fix="check the path, the network and your credentials"
        ) from None
    if not matched:
        raise ConfigError(
            "no file matches", where=where, fix=f"name a file, a glob or a directory of {', '.join(KNOWN_SUFFIXES)}"
        )
    return [protocol + str(f) for f in sorted(matched)]


def _protocols(fs: Any) -> Sequence[str]:
    return [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol


def _kind(path: str) -> Kind:
    if path.endswith(JSON_LINES):
        return "jsonl"
    for kind in ("parquet", "arrow"):
        if path.endswith(f".{kind}"):
            return kind
    raise ConfigError("not a kind of file that is known", where=path, fix=f"known: {', '.join(KNOWN_SUFFIXES)}")


def shard_digest(shard: Shard) -> str:
    """Identify a shard's content: sha256 of a local file; name, size and tag of a remote object; parameters otherwise."""
    if shard.kind in ("hub", "synthetic"):
        made_by = SYNTHETIC_VERSION if shard.kind == "synthetic" else ""
        return hashlib.sha256(f"{shard.kind} {made_by} {shard.location} {shard.split}".encode()).hexdigest()
    fs, path = fsspec.core.url_to_fs(shard.location)
    if "file" in _protocols(fs):
        return cached_file_sha256(Path(str(path)))
    info = fs.info(path)
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or str(info.get("LastModified", ""))
    return hashlib.sha256(f"{shard.location} {info['size']} {tag}".encode()).hexdigest()


def read_rows(shard: Shard) -> Iterator[tuple[int, Any]]:
    """Yield (ordinal, row) for every row; a row that cannot be read is a `Rejected`, and its neighbours go on.

    Where the shard itself breaks off, the last item is a `Rejected` with SHARD_UNREADABLE.
    """
    ordinal = -1
    try:
        for ordinal, row in enumerate(_rows(shard)):
            yield ordinal, row
    except (OSError, EOFError, pa.ArrowException, ValueError, KeyError) as error:
        yield ordinal + 1, Rejected("SHARD_UNREADABLE", f"{type(error).__name__}: {error}"[:300])


def _rows(shard: Shard) -> Iterable[Any]:
    match shard.kind:
        case "jsonl":
            with fsspec.open(shard.location, "rb") as raw:
                yield from map(_parse_line, _lines(_decompressed(raw, shard.location)))  # type: ignore[arg-type]
        case "parquet":
            with fsspec.open(shard.location, "rb") as raw:
                for batch in pq.ParquetFile(raw).iter_batches(batch_size=256):
                    yield from batch.to_pylist()
        case "arrow":
            with fsspec.open(shard.location, "rb") as raw, pa.ipc.open_stream(raw) as reader:
                for batch in reader:
                    yield from batch.to_pylist()
        case "synthetic":
            what = json.loads(shard.location)
            yield from synthetic.preference_pairs(what["pairs"], what["seed"], shard.split)
        case "hub":
            yield from _hub_rows(json.loads(shard.location))


def _hub_rows(what: dict[str, Any]) -> Iterable[Any]:
    import datasets

    try:
        return datasets.load_dataset(what["name"], what["subset"], split=what["split"], revision=what["revision"])
    except Exception as error:  # the hub's client raises many kinds; all mean that the data cannot be had
        raise DataError(
            f"cannot be loaded: {error}", where=f"hub:{what['name']}", fix="check name, split, network and HF_TOKEN"
        ) from error


def _decompressed(raw: BinaryIO, location: str) -> Any:
    for suffix, codec in ((".gz", "gzip"), (".zst", "zstd")):
        if location.endswith(suffix):
            return pa.CompressedInputStream(raw, codec)
    return raw


def _lines(stream: Any, chunk_bytes: int = 1 << 20) -> Iterator[bytes | Rejected]:
    """Split a byte stream into lines, never holding more than a chunk and one line of bounded length."""
    rest, skipping = b"", False
    while chunk := stream.read(chunk_bytes):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if skipping:
                skipping = False  # this is the end of a line that was reported already
            elif len(line) > MAX_ROW_BYTES:
                yield Rejected("TOO_LONG_BYTES", f"{len(line)} bytes")
            elif line.strip():
                yield line
        if len(rest) > MAX_ROW_BYTES:
            if not skipping:
                yield Rejected("TOO_LONG_BYTES", f"over {MAX_ROW_BYTES} bytes")
            rest, skipping = b"", True
    if rest.strip() and not skipping:
        yield rest


def _parse_line(line: bytes | Rejected) -> Any:
    if isinstance(line, Rejected):
        return line
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return Rejected("INVALID_UTF8", f"byte {error.start}: {line[:100]!r}")
    except (json.JSONDecodeError, RecursionError) as error:
        return Rejected("JSON_SYNTAX", f"{error}: {line[:100]!r}"[:300])
    return row
