"""Lists the shards (the files that the recipe's sources name), and divides them into pieces (ranges that one task reads)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow.parquet as pq

from dpo_ray.artifacts.digest_cache import cached_file_sha256
from dpo_ray.config.sources import Columns, FilesSource, HubSource, RowFormat, Source, SyntheticSource
from dpo_ray.data.readers.json_rows import begins_list
from dpo_ray.data.readers.locations import content_tag, file_name, file_system, is_http, is_local, opened, shown
from dpo_ray.errors import ConfigError, DpoRayError

SYNTHETIC_VERSION = 1  # increased when the grammar changes, so that artifacts made from it become stale
PIECE_BYTES = 64 << 20
HEAD_BYTES = 64 << 10

Kind = Literal["json", "csv", "tsv", "parquet", "arrow", "hub", "synthetic"]
PLAIN_JSON = (".jsonl", ".ndjson", ".json")
_COMPRESSED = ("", ".gz", ".zst")
_KINDS: dict[str, Kind] = {
    **{f"{end}{c}": "json" for end in PLAIN_JSON for c in _COMPRESSED},
    **{f".csv{c}": "csv" for c in _COMPRESSED},
    **{f".tsv{c}": "tsv" for c in _COMPRESSED},
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_KNOWN = ".jsonl, .ndjson, .json, .csv, .tsv (each also .gz and .zst), .parquet, .arrow"
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "state.json")  # written by `datasets` beside the data


SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in file names by which `datasets` recognises a split: https://huggingface.co/docs/hub/datasets-file-names-and-splits."""


@dataclass(frozen=True)
class Shard:
    """One input of a source: a file, a data set of the hub, or a synthetic data set."""

    split: str  # train, eval, or eval_NAME of a named set
    index: int  # its index among the split's shards
    source: int  # the index of its source among the split's sources
    name: str  # its name in reports: the source's name, else the file's
    kind: Kind
    location: str  # path or URI; for hub and synthetic data the parameters as JSON
    row_format: RowFormat
    columns: Columns
    criteria: Mapping[str, float]


@dataclass(frozen=True)
class Piece:
    """A range of a shard (input file) that one task reads. Large files of plain JSON Lines or Parquet have several pieces."""

    shard: Shard
    index: int = 0
    start: int = 0  # JSON Lines: the first byte; Parquet: the first row group
    stop: int | None = None  # one past the last; None: to the end


def field_of(split: str) -> str:
    """Return the recipe's field of a split: data.train, data.eval, data.eval.NAME, or online.prompts."""
    return "online.prompts" if split == "prompts" else f"data.{split.replace('_', '.', 1)}"


def list_shards(split: str, sources: Sequence[Source]) -> list[Shard]:
    """List all shards (input files) of a split in a stable order: by source, as in the recipe, and then by path.

    Raises:
        ConfigError: a path or glob matches no file, or the kind of a file is not known.
        InfrastructureError: the package that accesses a remote storage is not installed.
    """
    shards: list[Shard] = []
    for place, source in enumerate(sources):
        row_format, columns, criteria = "text", Columns(), {}
        if not isinstance(source, SyntheticSource):
            row_format, columns, criteria = source.format, source.columns, source.criteria
        for name, kind, location in _named(source, split):
            name = source.name or name
            shards.append(Shard(split, len(shards), place, name, kind, location, row_format, columns, criteria))
    return shards


def _named(source: Source, split: str) -> Iterator[tuple[str, Kind, str]]:
    """Yield (name, kind, location) for each shard of a source. The name is shown in reports."""
    match source:
        case FilesSource():
            for path in [source.path] if isinstance(source.path, str) else source.path:
                where = f"{field_of(split)}={shown(path)}"
                for file in one_split(_expand(path, where), path, source.split, where):
                    yield file_name(file), _kind(file, where), file
        case HubSource():
            what = source.model_dump(include={"path", "subset", "split", "revision"})
            yield f"{source.path}[{source.split}]", "hub", json.dumps(what)
        case SyntheticSource():
            yield "synthetic", "synthetic", json.dumps({"pairs": source.pairs, "seed": source.seed})


def _expand(path: str, where: str) -> list[str]:
    try:
        fs, root = file_system(path)
        if is_http(path):
            fs.info(root)  # raises if it does not exist
            return [path]
        protocol = "" if is_local(fs) else path.split("://", 1)[0] + "://"
        matched = _matching(fs, root, where)
    except DpoRayError:
        raise
    except Exception as error:  # each file system's client has its own exceptions: no credentials, no bucket, no route
        raise ConfigError(
            f"the files cannot be listed: {type(error).__name__}: {error}".replace(path, shown(path)),
            where=where,
            fix="check the path, the network and your credentials",
        ) from None
    if not matched:
        raise ConfigError("no file matches", where=where, fix=f"name a file, a glob or a directory with {_KNOWN}")
    return [protocol + file for file in sorted(matched)]


def one_split(files: Sequence[str], root: str, wanted: str | None, where: str) -> list[str]:
    """Return the files of the split `wanted`; if it is None, return all files, which must not belong to several splits.

    The split of a file is shown by a word (SPLIT_WORDS) in its name, or in the name of a folder below `root`:
    - If file and folder show different splits, the folder decides: `train/test-cases.jsonl` is training data.
    - But if the names of files show several splits, and the names of folders at most one, the names of files decide.
    - If none of these names shows a split, the name of `root`, or of the folder that contains `root`, decides.

    Raises:
        ConfigError: the files belong to several splits and `wanted` is None, or no file belongs to the split `wanted`.
    """
    base = _base(root)
    splits = _splits(files, base)
    found = sorted({split for split in splits.values() if split})
    if wanted is None and len(found) < 2:
        return list(files)
    if wanted is None:
        raise ConfigError(
            f"these files belong to the splits {', '.join(found)}, which must not be mixed",
            where=where,
            fix=f"set `split` of the source, such as {{type: files, path: ..., split: {found[-1]}}}, or name the files",
        )
    if not found and _told(reversed(base.split("/")[-2:])) == wanted:
        return list(files)
    if wanted not in found:
        there = f"there are files of {', '.join(found)}" if found else "no name of a file or folder shows a split"
        raise ConfigError(f"there is no split {wanted}; {there}", where=where, fix="correct `split`, or leave it out")
    return [file for file, split in splits.items() if split == wanted]


def _base(root: str) -> str:
    """Return the directory that contains all files of a path or glob; for a single file, return its own path."""
    fixed = re.split(r"[*?\[]", root, maxsplit=1)[0]
    base = fixed.rpartition("/")[0] if fixed != root else root
    base = base.removeprefix("file://")
    return base if "://" in base else str(Path(base).expanduser().absolute())


def _splits(files: Sequence[str], base: str) -> dict[str, str | None]:
    """Return the split of each file; None if neither the name of the file nor the names of its folders show a split."""
    folders, names = {}, {}
    for file in files:
        inside = file.removeprefix(base).strip("/") if file.startswith(base) and not is_http(file) else ""
        folders[file] = _told(reversed(inside.split("/")[:-1]))
        names[file] = _told([file_name(file)])
    if len(set(folders.values()) - {None}) > 1 or len(set(names.values()) - {None}) < 2:
        return {file: folders[file] or names[file] for file in files}
    return {file: names[file] or folders[file] for file in files}


def _told(names: Iterable[str]) -> str | None:
    """Return the split of the first name that contains a word for a split (SPLIT_WORDS); None if no name contains one."""
    for name in names:
        for word in re.split(r"[-_. 0-9]", name.lower()):
            for split, words in SPLIT_WORDS.items():
                if word in words:
                    return split
    return None


def _matching(fs: Any, root: str, where: str) -> list[str]:
    if fs.isdir(root):
        return _files_of_directory(fs, root, where)
    if fs.isfile(root):  # the name of a file may contain characters that have a special meaning in a glob
        return [root]
    return _files_of_glob(fs, root)


def _files_of_glob(fs: Any, pattern: str) -> list[str]:
    """List the files that match a glob. Hidden files and directories are skipped, unless a part of the glob begins with a dot."""
    parts = PurePosixPath(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    hidden = any(part.startswith(".") for part in parts[fixed:])
    return [f for f in fs.glob(pattern) if not fs.isdir(f) and (hidden or not _is_hidden(f, fixed))]


def _is_hidden(path: str, first: int) -> bool:
    """Return whether a component of a path, from index `first` on, begins with a dot, such as `.ipynb_checkpoints`."""
    return any(part.startswith(".") for part in PurePosixPath(path).parts[first:])


def _files_of_directory(fs: Any, root: str, where: str) -> list[str]:
    """List the data files of a directory. If `datasets` saved it, list only the files that its state.json names."""
    if fs.isfile(f"{root}/dataset_dict.json"):
        splits = json.loads(fs.cat_file(f"{root}/dataset_dict.json"))["splits"]
        raise ConfigError(
            f"this is a saved DatasetDict with the splits {', '.join(splits)}",
            where=where,
            fix=f"name one split's directory, such as {root}/{splits[0] if splits else 'train'}",
        )
    if fs.isfile(f"{root}/state.json"):
        state = json.loads(fs.cat_file(f"{root}/state.json"))
        if isinstance(state, dict) and "_data_files" in state:
            return [f"{root}/{_inside(file['filename'], where)}" for file in state["_data_files"]]
    below = len(PurePosixPath(root).parts)
    return [
        f for f in fs.find(root) if _is_data(PurePosixPath(f).name) and not _is_hidden(f, below) and not fs.isdir(f)
    ]


def _inside(name: str, where: str) -> str:
    """Return a file name that state.json contains; raise ConfigError if it leads out of the data set's directory."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ConfigError(
            f"state.json names a file outside the data set: {name!r}",
            where=where,
            fix="do not use this data set; if you saved it yourself, save it again",
        )
    return name


def _is_data(name: str) -> bool:
    return name.lower().endswith(tuple(_KINDS)) and name not in _NO_DATA and not name.startswith((".", "_"))


def _kind(location: str, where: str) -> Kind:
    name = file_name(location).lower()
    for suffix, kind in _KINDS.items():
        if name.endswith(suffix):
            return kind
    raise ConfigError(f"this kind of file is not known: {shown(location)}", where=where, fix=f"known: {_KNOWN}")


def shard_digest(shard: Shard) -> str:
    """Return a digest of the kind and the content of a shard (input file or data set).

    The content is identified by:
    - a local file: its sha256
    - a remote file: its location, size and checksum (or the modification time, if the storage has no checksum)
    - a file of the hub: the hub's own hash of its content
    - a data set of the hub: its name, subset, split and revision
    - synthetic data: its parameters

    Raises:
        ConfigError: the file cannot be read.
        InfrastructureError: the package that accesses a remote storage is not installed.
    """
    return hashlib.sha256(f"{shard.kind} {_content(shard)}".encode()).hexdigest()


def _content(shard: Shard) -> str:
    if shard.kind == "synthetic":
        return f"{SYNTHETIC_VERSION} {shard.location} {'train' if shard.split == 'train' else 'eval'}"
    if shard.kind == "hub":
        return shard.location
    try:
        fs, path = file_system(shard.location)
        if is_local(fs):
            return cached_file_sha256(Path(path))
        info = fs.info(path)
    except DpoRayError:
        raise
    except Exception as error:  # each file system's client has its own exceptions
        raise ConfigError(
            f"cannot be read: {type(error).__name__}: {error}".replace(shard.location, shown(shard.location)),
            where=f"{field_of(shard.split)}={shown(shard.location)}",
            fix="check that it exists and is readable",
        ) from None
    if info.get("blob_id"):  # the hub's own hash of the content, which an unchanged file keeps in every revision
        return f"blob {info['blob_id']}"
    return f"{shown(shard.location)} {info['size']} {content_tag(info)}"


def pieces(shard: Shard, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Divide a shard (input file) into pieces for parallel reading: plain JSON Lines by bytes, Parquet by row groups.

    All other shards are one piece. The pieces in their order contain exactly the rows of the shard. A damaged shard is
    also one piece; its damage is reported when the piece is read.

    Raises:
        InfrastructureError: a remote storage failed.
    """
    try:
        bounds = _bounds(shard, piece_bytes)
    except DpoRayError:
        raise
    except Exception:  # the same failure occurs again when the piece is read, and is accounted for there
        bounds = [0]
    stops = [*bounds[1:], None]
    return [Piece(shard, i, start, stop) for i, (start, stop) in enumerate(zip(bounds, stops, strict=True))]


def _bounds(shard: Shard, piece_bytes: int) -> list[int]:
    """Return where each piece of a shard begins: the number of a byte, or of a row group of a Parquet file."""
    is_plain = file_name(shard.location).lower().endswith(PLAIN_JSON)
    if is_http(shard.location) or not (shard.kind == "parquet" or (shard.kind == "json" and is_plain)):
        return [0]
    fs, path = file_system(shard.location)
    size_bytes = fs.info(path)["size"]
    if size_bytes <= piece_bytes:
        return [0]
    with opened(shard.location, at_random=True) as raw:
        if shard.kind == "json":
            return [0] if begins_list(raw.read(HEAD_BYTES)) else list(range(0, size_bytes, piece_bytes))
        groups = pq.read_metadata(raw)
    bounds, held_bytes = [0], 0
    for group in range(1, groups.num_row_groups):
        held_bytes += groups.row_group(group - 1).total_byte_size
        if held_bytes >= piece_bytes:
            bounds.append(group)
            held_bytes = 0
    return bounds
