"""Files in S3 and Google Cloud Storage, through fsspec. PUT requests are atomic, and `create` is a conditional PUT."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from dpo_ray.errors import DpoRayError, SetupError, StorageFailedError

from .disk import copy_and_hash
from .names import TEMPORARY_PREFIX

EXTRAS = {"s3": "s3", "gs": "gs"}  # scheme -> the extra of this package that installs its client
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted", "409")
CONFLICT_TRIES = 5
CONFLICT_WAIT_SECONDS = 0.2


class ObjectStore:
    """The objects below a prefix of a bucket. Methods raise OSError, or StorageFailedError if the client fails."""

    def __init__(self, scheme: str, root: str) -> None:
        self.scheme, self.root = scheme, root  # root: bucket/prefix

    def exists(self, name: str) -> bool:
        try:
            self._call("info", self._path(name))
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        info = self._call("info", self._path(name))
        if info["type"] == "directory":
            raise IsADirectoryError(f"{self._path(name)} is a directory")
        return int(info["size"])

    def read_bytes(self, name: str) -> bytes:
        return self._call("cat_file", self._path(name))

    def open_input(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._call("open", self._path(name), "rb"))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the size in bytes of every object below a prefix."""
        try:
            objects = self._call("find", self._path(prefix), detail=True)
        except FileNotFoundError:
            return {}
        below, sizes = f"{self._path(prefix)}/", {}
        for path, info in objects.items():
            if path.startswith(below) and not path.endswith("/") and f"/{TEMPORARY_PREFIX}" not in path:
                sizes[path.removeprefix(f"{self.root}/")] = int(info["size"])
        return sizes

    def list_dirs(self, prefix: str) -> list[str]:
        try:
            entries = self._call("ls", self._path(prefix), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [info["name"].rstrip("/").rpartition("/")[2] for info in entries if info["type"] == "directory"]

    def write(self, name: str, data: bytes) -> None:
        with self._bucket_must_exist():
            self._call("pipe_file", self._path(name), data)

    def create(self, name: str, data: bytes) -> None:
        """Write an object that must not exist yet. If several callers try, one succeeds, and all others get FileExistsError.

        If the response to a request is lost, the client may send the request again, and the store refuses it because
        the first request succeeded. So a caller that gets FileExistsError must compare the object with the data that
        the caller wrote.
        """
        for attempt in range(CONFLICT_TRIES):
            try:
                with self._bucket_must_exist():
                    self._call("pipe_file", self._path(name), data, mode="create")
                return
            except FileExistsError:
                raise
            except OSError as error:
                code = _service_code(error)
                if code in ("PreconditionFailed", "412"):
                    raise FileExistsError(f"{self._path(name)} exists") from error
                # When two PUTs arrive at the same time, S3 may refuse both and ask for a retry.
                busy = code in _CONFLICTS or error.errno == errno.EBUSY
                if not busy or attempt + 1 == CONFLICT_TRIES:
                    raise
            time.sleep(CONFLICT_WAIT_SECONDS * 2**attempt)

    def upload(self, name: str, source: Path) -> tuple[int, str]:
        """Copy a local file to the store in chunks; return its size in bytes and its sha256."""
        with open(source, "rb") as input_file, self._bucket_must_exist():
            target = self._call("open", self._path(name), "wb")
            try:
                count, sha256 = copy_and_hash(input_file, target)
                _translated("upload", self._path(name), target.close)
            except BaseException:
                # close() would publish the partial object, and so would the garbage collector.
                target.closed = True
                target.discard()
                raise
        return count, sha256

    def download(self, name: str, target: Path) -> None:
        self._call("get_file", self._path(name), str(target))

    def delete(self, name: str) -> None:
        try:
            self._call("rm_file", self._path(name))
        except FileNotFoundError:
            return

    def delete_tree(self, prefix: str) -> None:
        try:
            self._call("rm", self._path(prefix), recursive=True)
        except FileNotFoundError:
            return

    def delete_empty_dir(self) -> None:
        """Do nothing: a directory of an object store exists only as the prefix of its objects."""

    @contextmanager
    def _bucket_must_exist(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            where = f"{self.scheme}://{self.root}"
            fix = "create the bucket, or correct the address"
            raise StorageFailedError(f"the bucket does not exist: {error}", where=where, fix=fix) from error

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _call(self, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        function = getattr(_file_system(self.scheme), method)
        return _translated(method, f"{self.scheme}://{path}", lambda: function(path, *arguments, **options))


def _file_system(scheme: str) -> Any:
    """Return fsspec's client. fsspec keeps one client per process and thread, so this is cheap, and safe after a fork.

    Listings are never cached, because other processes write to the same bucket.
    """
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise SetupError(
            f"{scheme}:// needs a package that is not installed ({error})",
            where=f"{scheme}://",
            fix=f"pip install 'dpo-ray[{EXTRAS[scheme]}]'",
        ) from error


def _translated(action: str, where: str, call: Callable[[], Any]) -> Any:
    """Call the client; convert the client's exceptions, which have no common base class, to StorageFailedError."""
    try:
        return call()
    except (OSError, DpoRayError):
        raise
    except Exception as error:
        raise StorageFailedError(
            f"{action} failed: {type(error).__name__}: {error}",
            where=where,
            fix="check the credentials, the endpoint and the network, then run the same command again",
        ) from error


def _service_code(error: OSError) -> str:
    """Return the error code of the storage service, or "" if there is none.

    The code is read from the cause of the error, because s3fs recognises only the codes of AWS.
    """
    response = getattr(error.__cause__, "response", None)
    problem = response.get("Error") if isinstance(response, dict) else None
    return str(problem.get("Code", "")) if isinstance(problem, dict) else ""
