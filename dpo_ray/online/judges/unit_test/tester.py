"""The program of the process that runs the tests. The completion's code runs in another process (`judged.py`).

The tests call that code through messages. A result is either plain data, or a `Remote`, which stands for an object in
the other process and is equal only to itself. So no object of the completion can pretend to equal the expected result.
Arguments of the program: file descriptor of the connection to the other process, file descriptor of the pipe for the
verdict, CPU seconds, bytes of memory. Standard input: in the first line a secret token, which the program writes to the
pipe if all tests pass; then the code of the tests.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import os
import socket
import sys
from typing import Any

from dpo_ray.online.judges.unit_test.limits import limit_resources
from dpo_ray.online.judges.unit_test.wire import Channel, decode, encode

PR_SET_DUMPABLE = 4


class Remote:
    """Stands for an object in the completion's process. Each operation on it is sent to that process."""

    __slots__ = ("_calls", "_number")

    def __init__(self, calls: Calls, number: int) -> None:
        object.__setattr__(self, "_calls", calls)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._calls.ask("call", self, list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        return self._calls.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._calls.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._calls.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._calls.ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._calls.ask("delitem", self, key)

    def __contains__(self, item: Any) -> bool:
        return self._calls.ask("contains", self, item) is True

    def __len__(self) -> int:
        return self._calls.ask("len", self)

    def __iter__(self) -> Any:
        return self._calls.ask("iter", self)

    def __next__(self) -> Any:
        return self._calls.ask("next", self)

    def __str__(self) -> str:
        return self._calls.ask("str", self)

    def __repr__(self) -> str:
        return self._calls.ask("repr", self)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._number == self._number

    def __hash__(self) -> int:
        return self._number


class Calls:
    """Sends requests to the completion's process, and reads the replies."""

    def __init__(self, channel: Any) -> None:
        self._channel, self._functions = channel, []

    def names(self) -> dict[str, Any]:
        """Wait until the completion's code has run. Return the names that this code defines, with their values."""
        return {name: self._read(value) for name, value in self._channel.receive()["names"].items()}

    def ask(self, operation: str, *arguments: Any) -> Any:
        self._channel.send({"operation": operation, "arguments": self._describe(list(arguments))})
        while "callback" in (reply := self._channel.receive()):
            function = self._functions[reply["callback"]]
            value = function(*self._read(reply["arguments"]), **self._read(reply["named"]))
            self._channel.send({"reply": self._describe(value)})
        if "raised" in reply:
            raise _exception(reply["raised"], str(reply["text"]))
        if operation == "call" and (changed := self._read(reply["changed"])):
            for before, after in zip(
                (*arguments[1], *arguments[2].values()), (*changed[0], *changed[1].values()), strict=True
            ):
                _change_in_place(before, after)
        return self._read(reply["value"])

    def _describe(self, value: Any) -> Any:
        return encode(value, self._refer)

    def _refer(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Remote):
            return {"ref": [value._number, True]}
        if callable(value):
            self._functions.append(value)
            return {"callback": len(self._functions) - 1}
        raise TypeError(f"a value of the type {type(value).__name__} is not plain data")

    def _read(self, data: Any) -> Any:
        return decode(data, self._resolve)

    def _resolve(self, data: dict[str, Any]) -> Any:
        if "module" in data and data["module"] in sys.stdlib_module_names:
            return importlib.import_module(data["module"])
        if "callback" in data:  # a function of ours that came back
            return self._functions[data["callback"]]
        return Remote(self, int(data["ref"][0]))


def _exception(names: list[str], text: str) -> Exception:
    """Build an exception from the class names of an exception in the other process, the most specific name first.

    The first name that is a built-in exception is used; if there is none, RuntimeError.
    """
    for name in names:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind(text) if kind not in (UnicodeDecodeError, UnicodeEncodeError) else ValueError(text)
    return RuntimeError(text)


def _change_in_place(before: Any, after: Any) -> None:
    if isinstance(before, list) and isinstance(after, list):
        before[:] = after
    elif isinstance(before, dict | set) and isinstance(after, type(before)):
        before.clear()
        before.update(after)


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no process of the same user may read this process's memory
    descriptor, verdict, seconds, size = map(int, sys.argv[1:5])
    token, _, text = sys.stdin.buffer.read().partition(b"\n")  # not from files, which the completion could change
    limit_resources(seconds, size)
    sys.argv = ["tests.py"]
    tests = compile(text.decode("utf-8"), "tests.py", "exec")
    calls = Calls(Channel(socket.socket(fileno=descriptor)))
    space: dict[str, Any] = {"__name__": "__main__", **calls.names()}
    exec(tests, space)  # noqa: S102 - which is the purpose
    os.write(verdict, token)


if __name__ == "__main__":
    main()
