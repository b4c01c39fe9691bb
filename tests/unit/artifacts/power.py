"""Stop a child process before its n-th durable operation, as SIGKILL does or as a power cut does.

A kill keeps what the kernel has. A power cut also takes back what was not fsynced: the second half of a
file's bytes, and each name whose directory was not fsynced since.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

REACHED_THE_END = 7
CUT = 9
OPERATIONS = ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")


def run_and_cut(action: Callable[[], object], root: Path, cut: int, power: bool) -> bool:
    """Run `action` in a forked child that stops before operation number `cut`; True where it came to its end.

    With `power`, the machine stops there too, or just after the action has returned.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            machine = _Machine(root, cut, power)
            action()
            machine.stop(REACHED_THE_END)
        finally:
            os._exit(code)  # an exception: a failure of the test and not a cut
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (CUT, REACHED_THE_END), f"the child failed with {code}"
    return code == REACHED_THE_END


class _Machine:
    """The child's view of its disk: counts operations and knows what is not durable yet."""

    def __init__(self, root: Path, cut: int, power: bool) -> None:
        self.root, self.cut, self.power, self.count = root, cut, power, 0
        self.durable = {path.stat().st_ino for path in root.rglob("*") if path.is_file()}
        self.names: list[tuple[str, str, str]] = []  # (operation, source, target) whose directory is not fsynced
        self.real = {name: getattr(os, name) for name in OPERATIONS}
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(name))

    def stop(self, code: int) -> None:
        if self.power:
            self._lose_power()
        os._exit(code)

    def _wrapped(self, name: str) -> Callable:
        def operation(*arguments, **options):
            if self.count == self.cut:
                self.stop(CUT)
            self.count += 1
            new = name in ("rename", "replace", "link") and not os.path.lexists(arguments[1])
            result = self.real[name](*arguments, **options)
            if name == "fsync":
                self._fsynced(arguments[0])
            elif new:
                self.names.append((name, str(arguments[0]), str(arguments[1])))
            elif name == "mkdir":
                self.names.append((name, "", str(arguments[0])))
            return result

        return operation

    def _fsynced(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if not stat.S_ISDIR(status.st_mode):
            self.durable.add(status.st_ino)
            return
        still = []
        for name in self.names:
            parent = os.path.dirname(name[2])
            if not os.path.exists(parent) or os.stat(parent).st_ino != status.st_ino:
                still.append(name)
        self.names = still

    def _lose_power(self) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)
        for path in self.root.rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.durable:
                os.truncate(path, path.stat().st_size // 2)
        for operation, source, target in reversed(self.names):
            if not os.path.lexists(target):
                continue
            if operation == "mkdir":
                shutil.rmtree(target)
            elif operation == "link":
                os.unlink(target)
            elif os.path.isdir(os.path.dirname(source)):
                self.real["rename"](target, source)
