"""Writes to a local or network disk: after a crash or power cut, a file is complete or absent, never partial.

Every write goes to a temporary file in the same directory. The file is fsynced, and then gets its final name by one
atomic call. The directory is fsynced too, because the name of a file is stored in the directory, not in the file.

The files hold the user's data, so only the user can access new directories and files, whatever the umask is. People
share a directory with a group by its set-group-ID bit. The group can access new files below this directory as well.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from dpo_ray.errors import ArtifactError

from .names import TEMPORARY_PREFIX

COPY_CHUNK_BYTES = 8 * 2**20


class Disk:
    """A directory on a disk. Its methods raise OSError, which `Storage` converts to errors that say what to do."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Return the path of a file or directory. Refuse symbolic links below the root, because they could lead anywhere."""
        path = self.root
        for part in name.split("/") if name else ():
            path = path / part
            if path.is_symlink():
                raise ArtifactError(
                    "this is a symbolic link, which could lead out of the directory",
                    where=str(path),
                    fix="replace the link by the file itself; only the root of the storage may be a link",
                )
        return path

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def size(self, name: str) -> int:
        status = self.path(name).stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{self.path(name)} is a directory")
        return status.st_size

    def read_bytes(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def open_input(self, name: str) -> BinaryIO:
        return open(self.path(name), "rb")

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the size in bytes of every file below a directory; a symbolic link counts as a file."""
        sizes: dict[str, int] = {}
        for directory, below, names in os.walk(self.path(prefix), onerror=_raise_unless_absent):
            links = [name for name in below if Path(directory, name).is_symlink()]
            for name in names + links:
                if name.startswith(TEMPORARY_PREFIX):
                    continue
                path = Path(directory, name)
                with contextlib.suppress(FileNotFoundError):  # deleted by another process while we list
                    sizes[path.relative_to(self.root).as_posix()] = path.lstat().st_size
        return sizes

    def list_dirs(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self.path(prefix)) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it, so that the new content survives a crash."""
        with self._new_file(name, _replace) as file:
            file.write(data)

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not exist yet. If several callers try, one succeeds, and all others get FileExistsError."""
        if os.path.lexists(self.path(name)):  # only saves work; the exclusive link below decides
            raise FileExistsError(f"{self.path(name)} exists")
        with self._new_file(name, _link_exclusively) as file:
            file.write(data)

    def upload(self, name: str, source: Path) -> tuple[int, str]:
        """Copy a local file to this directory so that it survives a crash; return its size in bytes and its sha256."""
        with open(source, "rb") as input_file, self._new_file(name, _replace) as file:
            return copy_and_hash(input_file, file)

    def download(self, name: str, target: Path) -> None:
        shutil.copyfile(self.path(name), target)

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        """Delete a directory and everything in it, if it exists. Links in it are removed, but not followed."""
        path = self.path(prefix)
        while path.exists():
            with contextlib.suppress(FileNotFoundError):  # another process is deleting the same tree
                shutil.rmtree(path)

    def delete_empty_dir(self) -> None:
        try:
            self.root.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    def rename_dir(self, source: Path, name: str) -> None:
        """Rename a directory to its final name so that the files and the name survive a crash.

        Raises OSError (ENOTEMPTY or EEXIST) if a directory of that name exists and is not empty.
        """
        target = self.path(name)
        sync_tree(source)
        make_dirs(target.parent)
        os.rename(source, target)  # noqa: TID251 (this is the module that may rename)
        sync_dir(target.parent)
        sync_dir(source.parent)

    @contextlib.contextmanager
    def _new_file(self, name: str, publish: Callable[[str, str], None]) -> Iterator[BinaryIO]:
        """Yield a temporary file. On exit, fsync it and rename it by the call `publish(temporary_path, final_path)`."""
        final = self.path(name)
        make_dirs(final.parent)
        temporary = str(final.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
        try:
            with open(temporary, "xb", opener=private_opener) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, str(final))
        except Exception:
            with contextlib.suppress(OSError):  # the first error is the one to report
                os.unlink(temporary)
            raise
        sync_dir(final.parent)


def copy_and_hash(source: BinaryIO, target: BinaryIO) -> tuple[int, str]:
    """Copy a stream in chunks; return the number of bytes and their sha256 in hex."""
    sha256, count = hashlib.sha256(), 0
    while chunk := source.read(COPY_CHUNK_BYTES):
        sha256.update(chunk)
        target.write(chunk)
        count += len(chunk)
    return count, sha256.hexdigest()


def make_dirs(path: Path) -> None:
    """Create a directory and its parents so that they survive a crash.

    Each parent is fsynced, because the name of a new directory is part of its parent's data.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process has just made it
            directory.mkdir(mode=0o700)
            if _is_shared(directory.parent):
                directory.chmod(0o2770)
        sync_dir(directory.parent)


def private_opener(path: str, flags: int) -> int:
    """Open a file; this function is the `opener` of `open`.

    Only the user can access a new file, or the user and the group if its directory is shared.
    """
    if not flags & os.O_CREAT:
        return os.open(path, flags)
    try:
        descriptor = os.open(path, flags | os.O_EXCL, 0o600)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        return os.open(path, flags, 0o600)  # the rights of a file that exists are not changed
    if _is_shared(Path(path).parent):
        os.fchmod(descriptor, 0o660)
    return descriptor


def make_private(path: Path) -> None:
    """Change the access rights of a new file that a library has created to the rights that `private_opener` sets."""
    path.chmod(0o660 if _is_shared(path.parent) else 0o600)


def _is_shared(directory: Path) -> bool:
    return bool(directory.stat().st_mode & stat.S_ISGID)


def sync_dir(path: Path) -> None:
    """Fsync a directory, so that the names in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Fsync a directory and every file and directory below it, even those that other processes created."""
    for directory, _, names in os.walk(root, topdown=False, onerror=_raise_unless_absent):
        for name in names:
            path = Path(directory, name)
            if path.is_symlink() or name.startswith(TEMPORARY_PREFIX):
                continue  # not an artifact file, or an unfinished one that nobody will read
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_dir(Path(directory))


def _replace(temporary: str, final: str) -> None:
    os.replace(temporary, final)  # noqa: TID251 (this is the module that may rename)


def _link_exclusively(temporary: str, final: str) -> None:
    try:
        os.link(temporary, final)  # unlike rename, this refuses to replace a file; the new file appears complete
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(errno.ENOTSUP, "the file system has no hard links", final) from error
        raise
    os.unlink(temporary)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
