"""A cache for the sha256 of large files, so that planning a run does not read all of the model's weights each time."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from dpo_ray.errors import DpoRayError

from .digest import file_sha256
from .storage import Storage

SMALL_BYTES = 4 << 20  # files up to this size are read each time, which is cheaper than caching


def cached_file_sha256(path: Path) -> str:
    """Return a file's sha256. The sha256 of a large file is taken from the cache, unless the file has changed.

    A file counts as unchanged if its path, size, times and inode are the same. The cache is in
    $XDG_CACHE_HOME/dpo_ray/sha256 and may be deleted at any time.
    """
    path = path.resolve()
    stat = path.stat()
    if stat.st_size <= SMALL_BYTES:
        return file_sha256(path)
    identity = f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    name = hashlib.sha256(identity.encode()).hexdigest()
    cache = Storage(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_ray" / "sha256")
    if cache.exists(name):
        known = cache.read_bytes(name).decode()
        if len(known) == 64:
            return known
    digest = file_sha256(path)
    with suppress(DpoRayError):  # if the home directory is not writable, the file is only read again next time
        cache.write(name, digest.encode())
    return digest
