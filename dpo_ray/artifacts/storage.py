"""A directory on a disk or in an object store, with the same few operations and guarantees on both."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from dpo_ray.errors import ArtifactError, ConfigError, InfrastructureError, StorageFailedError, WriteRefusedError

from .disk import Disk, make_dirs, private_opener
from .manifest import FileEntry
from .names import TEMPORARY_PREFIX, checked_name, fault_in_name
from .object_store import EXTRAS, ObjectStore

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_WRITING = ("write", "create", "commit", "append to")  # actions, by the words in their errors


class Storage:
    """A directory, local or on an object store. The object holds only the address, so it is cheap and can be pickled.

    Names are relative, with '/' between parts; a name that could lead out of the directory raises ArtifactError.
    FileNotFoundError and FileExistsError are raised unchanged. All other failures raise ArtifactError on a disk, and
    StorageFailedError on an object store. Both errors say what failed, where, and what to do.
    """

    uri: str
    is_local: bool

    def __init__(self, uri: str | Path) -> None:
        """Parse a path or URI: `runs`, `/abs`, `file:///abs`, `s3://bucket/prefix`, `gs://bucket/prefix`.

        Local paths are made absolute at once, because worker processes change their working directory.
        Raises ConfigError if the address cannot be used.
        """
        scheme, root = _parse(str(uri))
        self.is_local = not scheme
        self.uri = f"{scheme}://{root}" if scheme else root
        self._place = ObjectStore(scheme, root) if scheme else Disk(Path(root))

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return type(self), (self.uri,)

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def child(self, *parts: str) -> Storage:
        """Return the Storage of a directory below this one; the directory need not exist."""
        if not parts:
            raise ArtifactError("child() was called without a name", where=self.uri)
        return Storage(self.full_path("/".join(checked_name(part, self.uri) for part in parts)))

    def local_path(self, name: str = "") -> Path:
        """Return the path of a file on a disk, for libraries that need a path. Raises ArtifactError on an object store."""
        if not isinstance(self._place, Disk):
            raise ArtifactError("an object store has no local paths", where=self.uri, fix="download the file first")
        return self._place.path(self._optional(name))

    def full_path(self, name: str = "") -> str:
        """Return the full path or URI of a file, for messages and for other libraries."""
        return f"{self.uri.rstrip('/')}/{self._optional(name)}" if name else self.uri

    def exists(self, name: str) -> bool:
        """Return whether a file or directory of that name exists."""
        with self._explained("look for", name):
            return self._place.exists(self._optional(name))

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        with self._explained("look at", name):
            return self._place.size(checked_name(name, self.uri))

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file."""
        with self._explained("read", name):
            return self._place.read_bytes(checked_name(name, self.uri))

    def open_input(self, name: str) -> BinaryIO:
        """Open a file for reading; the stream is seekable."""
        with self._explained("open", name):
            return self._place.open_input(checked_name(name, self.uri))

    def list_files(self, prefix: str = "") -> list[str]:
        """List all files below a directory, sorted, by names relative to this storage; [] if there is no directory."""
        return sorted(self.file_sizes(prefix))

    def file_sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the size in bytes of every file below a directory, by its name relative to this storage."""
        with self._explained("list", prefix):
            return self._place.sizes(self._optional(prefix))

    def list_dirs(self, prefix: str = "") -> list[str]:
        """List the names of the directories directly below a directory, sorted; [] if there is no such directory."""
        with self._explained("list", prefix):
            return sorted(self._place.list_dirs(self._optional(prefix)))

    def write(self, name: str, data: bytes, rows: int | None = None) -> FileEntry:
        """Write or replace a file atomically: readers always see the complete old or new file, even after a crash."""
        with self._explained("write", name):
            self._place.write(checked_name(name, self.uri), data)
        sha256 = hashlib.sha256(data).hexdigest()
        return FileEntry(name=name, path=name, bytes=len(data), sha256=sha256, rows=rows)

    def append(self, name: str, data: bytes) -> None:
        """Append data to a file on a disk. A missing file is created. A crash may leave only a part of the data."""
        path = self.local_path(checked_name(name, self.uri))
        with self._explained("append to", name), open(path, "ab", opener=private_opener) as stream:
            stream.write(data)

    def upload(self, name: str, source: Path, rows: int | None = None) -> FileEntry:
        """Copy a local file to this storage, with the guarantees of `write`. The file is hashed while it is copied."""
        with self._explained("write", name):
            count, sha256 = self._place.upload(checked_name(name, self.uri), source)
        return FileEntry(name=name, path=name, bytes=count, sha256=sha256, rows=rows)

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not exist yet. If several callers try, one succeeds, and all others get FileExistsError.

        An object store may refuse a repeated request because the first request succeeded, although its response was
        lost. A caller that needs certainty puts a unique value into the data. After FileExistsError, it reads the file
        and compares.
        """
        with self._explained("create", name):
            self._place.create(checked_name(name, self.uri), data)

    def download(self, name: str, target: Path) -> None:
        """Copy a file to a local path. The local file appears only when it is complete."""
        with self._explained("download", name):
            make_dirs(target.parent)
            temporary = target.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
            try:
                open(temporary, "xb", opener=private_opener).close()  # the client writes to it, and keeps its rights
                self._place.download(checked_name(name, self.uri), temporary)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        with self._explained("delete", name):
            self._place.delete(checked_name(name, self.uri))

    def delete_tree(self, prefix: str = "") -> None:
        """Delete a directory and everything in it, if it exists."""
        with self._explained("delete", prefix):
            self._place.delete_tree(self._optional(prefix))

    def delete_empty_dir(self) -> None:
        """Delete this directory if it is empty. In an object store, a directory disappears with its last file."""
        with self._explained("delete", ""):
            self._place.delete_empty_dir()

    def rename_into(self, source: Storage, name: str) -> None:
        """Move the directory `source` of the same disk into this directory, under `name`. This commits an artifact.

        The files and the name survive a crash. Raises FileExistsError if a directory of that name exists and is not
        empty. Raises ArtifactError on an object store.
        """
        if not isinstance(self._place, Disk):
            raise ArtifactError("an object store cannot rename a directory", where=self.uri)
        with self._explained("commit", name):
            try:
                self._place.rename_dir(source.local_path(), checked_name(name, self.uri))
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(self.full_path(name)) from error
                raise

    def check_writable(self) -> None:
        """Write, read and delete a test file, and check that `create` refuses to replace an existing file.

        Call this before any work starts. Raises an ArtifactError or InfrastructureError that says what to do.
        """
        name, data = f"probe-{secrets.token_hex(8)}", b"probe"
        self.create(name, data)
        try:
            self.create(name, data)
        except FileExistsError:
            intact = self.read_bytes(name) == data
        else:
            raise InfrastructureError(
                "the storage ignores exclusive creation (If-None-Match: *), so runs could overwrite each other",
                where=self.uri,
                fix="use a disk, AWS S3, Google Cloud Storage or an S3 server with conditional writes",
            )
        finally:
            self.delete(name)
        if not intact:
            raise InfrastructureError(
                "a test file was written, but reading it back returned other content",
                where=self.uri,
                fix="use another storage, or have this one checked",
            )

    def _optional(self, name: str) -> str:
        return checked_name(name, self.uri) if name else ""

    @contextmanager
    def _explained(self, action: str, name: str) -> Iterator[None]:
        """Convert an OSError to an error that says what to do. FileNotFoundError and FileExistsError stay unchanged."""
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            where = f"{self.uri}/{name}" if name else self.uri
            kind = ArtifactError if self.is_local else StorageFailedError
            if self.is_local and is_refusal(error) and action in _WRITING:
                kind = WriteRefusedError
            what = f"cannot {action}: {error.strerror or error}"
            raise kind(what, where=where, fix=_advice(error)) from error


def is_refusal(error: BaseException) -> bool:
    """Return whether a disk refused a write for a lasting reason: it is full or read-only, or permission is missing."""
    return isinstance(error, OSError) and error.errno in (*_NO_SPACE, *_NO_PERMISSION)


def _advice(error: OSError) -> str:
    again = "then run the same command again: finished work is kept"
    if error.errno in _NO_SPACE:
        return f"free space there or raise the quota, {again}"
    if error.errno in _NO_PERMISSION or isinstance(error, PermissionError):
        return f"grant this user or these credentials the permission, or choose another location, {again}"
    if error.errno == errno.ENOTSUP:
        return "choose a disk that supports this; for a bucket, use its s3:// or gs:// address instead of a mount"
    if error.errno == errno.EIO:
        return f"check the disk or the mount for faults (dmesg), {again}"
    return f"remove the cause, {again}"


def _parse(uri: str) -> tuple[str, str]:
    """Split an address into (scheme, root): ('', '/abs/path') or ('s3', 'bucket/prefix')."""
    fix = "use a path, file:///path, s3://bucket/prefix or gs://bucket/prefix"
    if "\x00" in uri or not uri:
        raise ConfigError("a storage address is empty or contains NUL", where=repr(uri), fix=fix)
    if uri.startswith(("s3:/", "gs:/", "file:/")) and "://" not in uri:
        raise ConfigError("the address lacks a slash after the scheme; Path() removes it", where=uri, fix=fix)
    if "://" not in uri:
        return "", os.path.abspath(os.path.expanduser(uri))
    scheme, _, root = uri.partition("://")
    if scheme == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ConfigError("the file:// address is relative, or names another machine", where=uri, fix=fix)
        return "", os.path.abspath(unquote(parts.path))
    if scheme not in EXTRAS:
        raise ConfigError(f"{scheme}:// storage is not supported", where=uri, fix=fix)
    root = root.rstrip("/")
    if fault := fault_in_name(root):
        raise ConfigError(f"the address {fault}", where=uri, fix=fix)
    return scheme, root
