"""Run uv, pip and Python: all that they print goes to the log, what matters of it is shown as it comes."""

from __future__ import annotations

import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .failures import masked

MAIN_LINES = re.compile(r"Resolved|Prepared|Uninstalled|Installed|Audited|Checked|warning:")
# Of some 60 downloads that uv names, those of 50 MiB and more: the ones that a user waits for.
LARGE_DOWNLOADS = re.compile(r"Downloading \S+ \((?:[5-9]\d|\d{3,})(?:\.\d+)?MiB|Downloading \S+ \([\d.]+GiB")
TICK_SECONDS = 1.0
SECONDS_TO_STOP = 5.0


@dataclass
class Output:
    """What a process printed, and its exit code."""

    code: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Return all of it."""
        return "\n".join(self.lines)


@dataclass
class Runner:
    """Runs processes one after another, in one directory, with one log."""

    directory: Path
    log: Path
    variables: Mapping[str, str]
    lock: int  # passed on, so that it is held for as long as a process of this installation lives
    log_complaint: str = ""

    def run(
        self, command: Sequence[str | Path], variables: Mapping[str, str] | None = None, shown: bool = False
    ) -> Output:
        """Run a command to its end; show its main lines where asked to."""
        self._write(f"$ {' '.join(str(part) for part in command)}")
        process = subprocess.Popen(  # noqa: S603 - uv, pip and Python, with arguments of this tool
            [str(part) for part in command],
            cwd=self.directory,
            env=_uncoloured(os.environ) | dict(self.variables) | dict(variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(self.lock,),
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            return self._followed(process, shown)
        except BaseException:
            _stop(process)
            raise

    def _followed(self, process: subprocess.Popen[bytes], shown: bool) -> Output:
        output, ticker = Output(), Ticker(process.pid, shown and sys.stderr.isatty())
        assert process.stdout is not None  # noqa: S101 - it was asked for
        for line in _lines(process.stdout):
            if line is None:
                ticker.show()
                continue
            output.lines.append(line)
            self._write(line)
            ticker.note(line)
            if shown and (MAIN_LINES.match(line) or LARGE_DOWNLOADS.match(line)):
                ticker.clear()
                print(f"    {masked(line)}", flush=True)
        ticker.clear()
        output.code = process.wait()
        return output

    def _write(self, line: str) -> None:
        if self.log_complaint:
            return
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(masked(line) + "\n")
        except OSError as error:
            self.log_complaint = f"{self.log} could not be written: {error.strerror}"


class Ticker:
    """Shows on a terminal that something goes on: seconds, bytes written, and what is being downloaded."""

    def __init__(self, process: int, active: bool) -> None:
        self.process = process
        self.active = active
        self.start = time.monotonic()
        self.downloading: list[str] = []

    def note(self, line: str) -> None:
        """Keep count of the downloads that have begun and not ended."""
        found = re.match(r"\s*(Downloading|Downloaded|Prepared) (\S+)", line)
        if not found:
            return
        if found[1] == "Downloading":
            self.downloading.append(found[2])
        else:
            self.downloading = [name for name in self.downloading if found[1] == "Downloaded" and name != found[2]]

    def show(self) -> None:
        """Write the line again, over the last one."""
        if not self.active:
            return
        parts = [f"{time.monotonic() - self.start:.0f} s", _bytes_written(self.process), ", ".join(self.downloading)]
        line = "    ... " + "; ".join(part for part in parts if part)
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # some terminals do not know
        sys.stderr.write("\r" + line[: columns - 1] + "\x1b[K")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the line away, before another is printed."""
        if self.active:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _uncoloured(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}


def _bytes_written(process: int) -> str:
    try:
        counts = Path(f"/proc/{process}/io").read_text(encoding="ascii").split()
        return f"{int(counts[counts.index('wchar:') + 1]) / 1e6:,.0f} MB written"
    except (OSError, ValueError):  # not Linux, or it has just ended
        return ""


def _lines(stream: IO[bytes]) -> Iterator[str | None]:
    """Yield the lines of a stream as they come, and None after each second without one."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(TICK_SECONDS):
                yield None
                continue
            piece = os.read(stream.fileno(), 1 << 16)
            if not piece:
                break
            *whole, pending = (pending + piece).split(b"\n")
            yield from (line.decode(errors="replace").rstrip() for line in whole)
    if pending:
        yield pending.decode(errors="replace")


def _end_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, even by SIGKILL: two would install into one environment."""
    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
