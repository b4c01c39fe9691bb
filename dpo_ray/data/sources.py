"""Shards: what a recipe's sources name, file by file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec

from dpo_ray.artifacts.digest_cache import cached_file_sha256
from dpo_ray.config.data import Columns, FilesSource, HubSource, RowFormat, Source, SyntheticSource
from dpo_ray.errors import ConfigError, InfrastructureError

SYNTHETIC_VERSION = 1  # raised when the grammar changes, so that artifacts made of it become stale
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
                    found.extend(
                        (PurePosixPath(f).name, _kind(f), f, source.format, source.columns)
                        for f in _expand(path, split)
                    )
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
        protocol = "" if "file" in protocols(fs) else path.split("://", 1)[0] + "://"
        if fs.isdir(root):
            matched = _files_of_directory(fs, str(root), where)
        else:  # a file's own name may hold characters that mean something in a glob
            matched = [root] if fs.isfile(root) else _files_of_glob(fs, str(root))
    except ConfigError:
        raise
    except ImportError as error:
        raise InfrastructureError(
            str(error), where=where, fix="install the extra: pip install 'dpo-ray[s3]' or 'dpo-ray[gs]'"
        ) from None
    except Exception as error:  # each file system's client has kinds of its own: no credentials, no bucket, no route
        raise ConfigError(
            f"cannot be listed: {error}", where=where, fix="check the path, the network and your credentials"
        ) from None
    if not matched:
        raise ConfigError(
            "no file matches", where=where, fix=f"name a file, a glob or a directory of {', '.join(KNOWN_SUFFIXES)}"
        )
    return [protocol + str(f) for f in sorted(matched)]


def _files_of_glob(fs: Any, pattern: str) -> list[str]:
    """List the files that match; hidden ones, as in a shell, only where the pattern names the dot."""
    hidden = PurePosixPath(pattern).name.startswith(".")
    return [f for f in fs.glob(pattern) if fs.isfile(f) and (hidden or not PurePosixPath(f).name.startswith("."))]


def _files_of_directory(fs: Any, root: str, where: str) -> list[str]:
    """List a directory's data files; of a saved data set, those that its state names and no others."""
    if fs.isfile(f"{root}/dataset_dict.json"):
        splits = json.loads(fs.cat_file(f"{root}/dataset_dict.json"))["splits"]
        raise ConfigError(
            f"a saved DatasetDict with the splits {', '.join(splits)}",
            where=where,
            fix=f"name one split's directory, such as {root}/{splits[0] if splits else 'train'}",
        )
    if fs.isfile(f"{root}/state.json"):
        state = json.loads(fs.cat_file(f"{root}/state.json"))
        if isinstance(state, dict) and "_data_files" in state:
            return [f"{root}/{file['filename']}" for file in state["_data_files"]]
    return [f for f in fs.find(root) if f.endswith(KNOWN_SUFFIXES) and not PurePosixPath(f).name.startswith((".", "_"))]


def protocols(fs: Any) -> Sequence[str]:
    """List the names of a file system's protocol; `file` is among those of the local one."""
    return [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol


def _kind(path: str) -> Kind:
    if path.endswith(JSON_LINES):
        return "jsonl"
    for kind in ("parquet", "arrow"):
        if path.endswith(f".{kind}"):
            return kind
    raise ConfigError("not a kind of file that is known", where=path, fix=f"known: {', '.join(KNOWN_SUFFIXES)}")


def shard_digest(shard: Shard) -> str:
    """Identify a shard's content: sha256 of a local file; name, size and tag of a remote object; parameters otherwise.

    Raises:
        ConfigError: the file cannot be read.
    """
    if shard.kind in ("hub", "synthetic"):
        made_by = SYNTHETIC_VERSION if shard.kind == "synthetic" else ""
        return hashlib.sha256(f"{shard.kind} {made_by} {shard.location} {shard.split}".encode()).hexdigest()
    fs, path = fsspec.core.url_to_fs(shard.location)
    try:
        if "file" in protocols(fs):
            return cached_file_sha256(Path(str(path)))
        info = fs.info(path)
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error}",
            where=f"data.{shard.split}={shard.location}",
            fix="check that it is there and may be read",
        ) from None
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or str(info.get("LastModified", ""))
    return hashlib.sha256(f"{shard.location} {info['size']} {tag}".encode()).hexdigest()
