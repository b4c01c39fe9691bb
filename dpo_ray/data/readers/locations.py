"""Opens the files of shards, which are local or at a location that fsspec can access (s3://, gs://, hf://, https://)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from dpo_ray.errors import InfrastructureError, SetupError

BUFFER_BYTES = 1 << 20
HTTP = ("http://", "https://")
_EXTRAS = {"s3": "dpo-ray[s3]", "s3a": "dpo-ray[s3]", "gs": "dpo-ray[gs]", "gcs": "dpo-ray[gs]"}
_TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime")


def file_system(location: str) -> tuple[Any, str]:
    """Return the file system of a path or URI, and the path within this file system.

    Raises:
        SetupError: the package that accesses this file system is not installed.
        ValueError: the protocol is not known.
    """
    try:
        fs, path = fsspec.core.url_to_fs(location)
    except ImportError as error:
        extra = _EXTRAS.get(location.partition("://")[0])
        fix = f"install the extra: pip install '{extra}'" if extra else "install that package next to dpo-ray"
        raise SetupError(
            f"the package that reads this location is missing: {error}", where=shown(location), fix=fix
        ) from None
    return fs, str(path)


def is_local(fs: Any) -> bool:
    """Return whether a file system is the local one of this machine."""
    protocols: Sequence[str] = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    return "file" in protocols


def is_http(location: str) -> bool:
    """Return whether a location is an HTTP(S) URL, which has no directories and may end with a query."""
    return location.startswith(HTTP)


def file_name(location: str) -> str:
    """Return the file name of a location; the query of a URL is not part of it."""
    if is_http(location):
        location = unquote(urlsplit(location).path)
    return PurePosixPath(location).name


def shown(location: str) -> str:
    """Return a location without secrets, for messages and manifests.

    From a URL, user and password are removed, and the query, because it may contain a signature.
    """
    scheme, sign, rest = location.partition("://")
    if not sign:
        return location
    place, question, query = rest.partition("?")
    if question and not is_http(location) and "=" not in query:  # a glob of an object store
        place = rest
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def content_tag(info: dict[str, Any]) -> str:
    """Return a text that changes when a remote file changes: its checksum, or its modification time if there is none."""
    return next((str(info[key]) for key in _TAGS if info.get(key)), "")


@contextmanager
def opened(location: str, *, at_random: bool = False) -> Iterator[Any]:
    """Open a file for reading bytes. Set `at_random` if positions in the file are to be read in any order.

    Raises:
        InfrastructureError: a remote storage failed when the file was opened or read; the data itself may be sound.
        OSError: a local file cannot be read, or the file does not exist.
    """
    fs, path = file_system(location)
    if is_local(fs):
        with open(path, "rb") as raw:
            yield raw
        return
    # Sequential reads use one stream, which every server supports; Parquet reads its own byte ranges, for which a cache
    # would only cause overhead.
    options: dict[str, Any] = {"cache_type": "none"} if at_random else {}
    if is_http(location) and not at_random:
        options = {"block_size": 0, "headers": {"Accept-Encoding": "identity"}}
    try:
        raw = fs.open(path, "rb", **options)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise failing_storage(location, error) from error
    with raw:
        remote = RemoteFile(raw, location)
        yield remote if at_random else io.BufferedReader(remote, BUFFER_BYTES)


class RemoteFile(io.RawIOBase):
    """A file on a remote storage. If reading fails, InfrastructureError is raised, because the rows may be sound."""

    def __init__(self, raw: Any, location: str) -> None:
        self._raw, self._location = raw, location

    def read(self, size: int = -1) -> bytes:
        """Read bytes; raise InfrastructureError if the storage fails."""
        try:
            return self._raw.read(size)
        except Exception as error:
            raise failing_storage(self._location, error) from error

    def readinto(self, buffer: Any) -> int:
        """Read bytes into the buffer, at most as many as fit, and return their number."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position in the file."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """Return the position in the file."""
        return self._raw.tell()

    def readable(self) -> bool:
        """Return True, because the file was opened for reading."""
        return True

    def seekable(self) -> bool:
        """Return whether the file supports seeking; a stream from a web server does not."""
        return getattr(self._raw, "blocksize", 1) != 0


def failing_storage(location: str, error: Exception) -> InfrastructureError:
    """Build the error to raise if a remote storage fails. It advises to run the same command again."""
    what = f"reading failed: {type(error).__name__}: {error}".replace(location, shown(location))
    return InfrastructureError(what[:300], where=shown(location), fix="run the same command again")
