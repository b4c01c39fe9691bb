"""Where shards lie: local files and those that fsspec reaches (s3://, gs://, hf://, https://), found and opened."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from dpo_ray.errors import InfrastructureError

BUFFER_BYTES = 1 << 20
HTTP = ("http://", "https://")
_EXTRAS = {"s3": "dpo-ray[s3]", "s3a": "dpo-ray[s3]", "gs": "dpo-ray[gs]", "gcs": "dpo-ray[gs]"}
_TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime")


def file_system(location: str) -> tuple[Any, str]:
    """Return the file system of a path or URI, and the path in it.

    Raises:
        InfrastructureError: the package that reaches it is not installed.
        ValueError: there is no such protocol.
    """
    try:
        fs, path = fsspec.core.url_to_fs(location)
    except ImportError as error:
        extra = _EXTRAS.get(location.partition("://")[0])
        fix = f"install the extra: pip install '{extra}'" if extra else "install that package beside dpo-ray"
        raise InfrastructureError(
            f"the package that reads it is missing: {error}", where=shown(location), fix=fix
        ) from None
    return fs, str(path)


def is_local(fs: Any) -> bool:
    """Say whether a file system is the machine's own."""
    protocols: Sequence[str] = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    return "file" in protocols


def is_http(location: str) -> bool:
    """Say whether a location is a URL of the web, which has no directories and may end with a query."""
    return location.startswith(HTTP)


def file_name(location: str) -> str:
    """Name the file alone: of a URL without its query."""
    if is_http(location):
        location = unquote(urlsplit(location).path)
    return PurePosixPath(location).name


def shown(location: str) -> str:
    """Write a location for people and manifests: the query of a URL is left out, since signatures stand there."""
    if not is_http(location):
        return location
    parts = urlsplit(location)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def content_tag(info: dict[str, Any]) -> str:
    """Return what a remote storage says of a file's content: a checksum where it has one, else the time of its change."""
    return next((str(info[key]) for key in _TAGS if info.get(key)), "")


@contextmanager
def opened(location: str, *, at_random: bool = False) -> Iterator[Any]:
    """Open a file for reading in bytes, from its beginning on or, `at_random`, for seeking as well.

    Raises:
        InfrastructureError: a remote storage failed, here or while the file is read; the data itself may be sound.
        OSError: a local file cannot be read, or the file is not there.
    """
    fs, path = file_system(location)
    if is_local(fs):
        with open(path, "rb") as raw:
            yield raw
        return
    # What is read once from the beginning comes as one stream, which every server can give; Parquet is read in ranges
    # of its own, to which a cache would only add.
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
    """A file on a remote storage, whose failures are the storage's: rows must not be given up for them."""

    def __init__(self, raw: Any, location: str) -> None:
        self._raw, self._location = raw, location

    def read(self, size: int = -1) -> bytes:
        """Read; raise InfrastructureError where the storage fails."""
        try:
            return self._raw.read(size)
        except Exception as error:
            raise failing_storage(self._location, error) from error

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as the buffer takes, or fewer."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place in the file."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """Return the place in the file."""
        return self._raw.tell()

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say no of a stream from a web server."""
        return getattr(self._raw, "blocksize", 1) != 0


def failing_storage(location: str, error: Exception) -> InfrastructureError:
    """Make the error that says that not the data is at fault."""
    what = f"reading failed: {type(error).__name__}: {error}".replace(location, shown(location))
    return InfrastructureError(what[:300], where=shown(location), fix="run the same command again")
