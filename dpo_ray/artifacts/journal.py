"""A journal: a file to which one writer appends lines.

When `append` returns, the appended lines survive a crash. If `append` fails, none of them is in the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dpo_ray.errors import ArtifactError

from .disk import make_dirs, private_opener, sync_dir


class Journal:
    """The writer of a journal. Every line ends with a newline; an unfinished last line, left by a crash, is removed."""

    def __init__(self, path: Path) -> None:
        """Open the file, or create it. Raises ArtifactError if this fails."""
        self._path = path
        try:
            make_dirs(path.parent)
            self._descriptor = private_opener(str(path), os.O_RDWR | os.O_CREAT | os.O_APPEND)
            sync_dir(path.parent)
            self._bytes = path.read_bytes().rfind(b"\n") + 1
            os.ftruncate(self._descriptor, self._bytes)
        except OSError as error:
            raise self._explained(error) from error

    def append(self, lines: Sequence[bytes]) -> None:
        """Append lines, which must contain no newline, so that they survive a crash.

        Raises ArtifactError if this fails. Then none of the lines is in the file.
        """
        data = b"".join(line + b"\n" for line in lines)
        try:
            os.ftruncate(self._descriptor, self._bytes)  # remove what a failed append may have left
            written = 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._explained(error) from error
        self._bytes += len(data)

    def close(self) -> None:
        os.close(self._descriptor)

    def _explained(self, error: OSError) -> ArtifactError:
        return ArtifactError(
            f"cannot append to the file: {error.strerror or error}",
            where=str(self._path),
            fix="free space there or repair the disk, then run the same command again: all earlier lines are kept",
        )


def whole_lines(data: bytes) -> list[bytes]:
    """Split a journal's content into lines; leave out an unfinished last line."""
    return data.split(b"\n")[:-1]
