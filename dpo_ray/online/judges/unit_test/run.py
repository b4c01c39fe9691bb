"""Runs unit tests of a completion's Python code in two processes: one runs the code, the other runs the tests.

Both have limits of time and memory. The verdict comes from the process of the tests, which the code cannot reach. The
process of the code confines itself to new namespaces: it has no network and does not see other processes, and when it
ends, all processes that it has started end too. But it can still read and write the same files as this user.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

POLL_SECONDS = 0.01
_HERE = Path(__file__).parent
_SHARED = ("limits.py", "wire.py")
_CONFINED = "import sys\nsys.exit(0 if confine() else 3)\n"


def passes(code: str, tests: str, timeout_seconds: float, memory_mib: int, *, confined: bool = True) -> bool:
    """Run the tests of a completion's code, and return whether the tests end without an exception.

    Args:
        code: the completion's code.
        tests: the code of the tests, which use the names that `code` defines.
        timeout_seconds: limit of the wall-clock time of the tests. Rounded up, it also limits each process's CPU time.
        memory_mib: limit of the address space of each process, and of the size of each file that it writes.
        confined: if True, run the code only in a sandbox. If no sandbox can be set up, run nothing and return False.
    """
    token = secrets.token_hex(16).encode()
    limits = [str(int(timeout_seconds) + 1), str(memory_mib << 20)]
    reading, writing = os.pipe()
    ours, theirs = socket.socketpair()
    try:
        os.set_blocking(reading, False)
        with tempfile.TemporaryDirectory(prefix="dpo-ray-unit-test-", ignore_cleanup_errors=True) as directory:
            places = [Path(directory, name) for name in ("code", "tests")]
            for place in places:
                place.mkdir()
            (places[0] / "completion.py").write_text(code, encoding="utf-8", errors="replace")
            judged = _started(
                "judged.py", [str(theirs.fileno()), *limits, str(int(confined))], places[0], theirs.fileno()
            )
            tester = _started(
                "tester.py", [str(ours.fileno()), str(writing), *limits], places[1], ours.fileno(), writing
            )
            ours.close()
            theirs.close()
            try:
                assert tester.stdin is not None  # noqa: S101 - it is a pipe
                tester.stdin.write(token + b"\n" + tests.encode("utf-8", "replace"))
                tester.stdin.close()
                _wait(tester, timeout_seconds)
            finally:
                _kill(tester)
                _kill(judged)
        return _written(reading) == token
    except BrokenPipeError:  # the tests' process ended before it was told the token
        return False
    finally:
        os.close(reading)
        os.close(writing)
        ours.close()
        theirs.close()


@functools.cache
def can_confine() -> bool:
    """Return whether a process of this user can enter new namespaces on this machine."""
    program = _text(*_SHARED, "judged.py").replace('if __name__ == "__main__":\n    main()\n', "") + _CONFINED
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-I", "-c", program], capture_output=True, timeout=60, start_new_session=True
    )
    return done.returncode == 0


def _started(program: str, arguments: Sequence[str], directory: Path, *descriptors: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - running the code is the purpose
        [sys.executable, "-I", "-c", _text(*_SHARED, program), *arguments],
        cwd=directory,
        env={"PATH": os.defpath, "HOME": str(directory), "TMPDIR": str(directory), "LANG": "C.UTF-8"},
        stdin=subprocess.PIPE if program == "tester.py" else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=descriptors,
        start_new_session=True,
    )


@functools.cache
def _text(*names: str) -> str:
    """Join the text of some files of this folder to one program.

    The files' imports from dpo_ray are left out, because the program contains the code that they import.
    """
    lines = [line for name in names for line in (_HERE / name).read_text(encoding="utf-8").splitlines()]
    own = [line for line in lines if not line.startswith(("from __future__ import", "from dpo_ray."))]
    return "\n".join(["from __future__ import annotations", *own, ""])


def _wait(process: subprocess.Popen[bytes], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    # The process is reaped last (in `_kill`). Until then no other process can get its id, which its group has too.
    while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and all processes that are left in its process group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _written(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except BlockingIOError:
        return b""
