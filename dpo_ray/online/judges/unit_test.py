"""Unit tests of a completion's Python code, run in a separate process with limits.

The limits stop code that runs away. They are not a sandbox: the code can read what this user can read, use the network,
and leave processes behind that moved to their own session.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

POLL_SECONDS = 0.01

# The process sets its limits itself before it reads the code: between fork and exec, nothing may run in a parent with
# threads. The token proves that all of the code ran: code that exits early, with whatever status, has passed no test.
_RUN = """
import os, resource, sys
seconds, size, descriptor, token = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].encode()
for limit, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, size), (resource.RLIMIT_FSIZE, size),
                     (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))
sys.argv = ["completion.py"]
space = {"__name__": "__main__"}
for name in ("completion.py", "tests.py"):
    with open(name, encoding="utf-8") as file:
        text = file.read()
    exec(compile(text, name, "exec"), space)
os.write(descriptor, token)
"""


def passes(code: str, tests: str, timeout_seconds: float, memory_mib: int) -> bool:
    """Return whether the tests, which follow the code in one namespace, end without an exception.

    Args:
        timeout_seconds: limit of the whole process, in wall-clock time and, rounded up, in CPU time.
        memory_mib: limit of the address space, and of each file that the process writes.
    """
    token = secrets.token_hex(16)
    reading, writing = os.pipe()
    try:
        os.set_blocking(reading, False)
        with tempfile.TemporaryDirectory(prefix="dpo-ray-unit-test-", ignore_cleanup_errors=True) as directory:
            Path(directory, "completion.py").write_text(code, encoding="utf-8", errors="replace")
            Path(directory, "tests.py").write_text(tests, encoding="utf-8", errors="replace")
            limits = [str(int(timeout_seconds) + 1), str(memory_mib << 20), str(writing)]
            process = subprocess.Popen(  # noqa: S603 - running the code is the purpose
                [sys.executable, "-I", "-c", _RUN, *limits, token],
                cwd=directory,
                env={"PATH": os.defpath, "HOME": directory, "TMPDIR": directory, "LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(writing,),
                start_new_session=True,
            )
            _end(process, timeout_seconds)
        return _written(reading) == token.encode()
    finally:
        os.close(reading)
        os.close(writing)


def _end(process: subprocess.Popen[bytes], timeout_seconds: float) -> None:
    """Wait until the process ends or its time is up; then kill it, and what it left in its process group."""
    deadline = time.monotonic() + timeout_seconds
    try:
        # The process is reaped last: until then no other process can get its id, which is also the group's.
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _written(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except BlockingIOError:
        return b""
