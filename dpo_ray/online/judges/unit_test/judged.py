"""The program of the process that runs a completion's code. The tests run in another process (`tester.py`).

This process executes the calls that the tests request, and never learns the result of the tests. Before it reads the
code, it confines itself to new namespaces: without a network, without a view of other processes, and without a way to
get more rights.
Arguments of the program: file descriptor, CPU seconds, bytes of memory, whether it must be confined.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from typing import Any

from dpo_ray.online.judges.unit_test.limits import limit_resources
from dpo_ray.online.judges.unit_test.wire import Channel, decode, encode

CLONE_NEWNS, CLONE_NEWIPC = 0x00020000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


def confine() -> bool:
    """Enter new namespaces, start a child as the first process in these namespaces, and return True in the child.

    The parent process waits for the child, and then ends. Return False if the machine does not allow new namespaces.
    """
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID):
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    child = os.fork()
    if child:  # when the first process of a namespace ends, the kernel kills all other processes in it
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        return False
    # The old /proc would show all processes of this user, with their environment. If no new /proc is allowed (in some
    # containers), an empty directory hides the old one.
    return not (
        libc.mount(b"proc", b"/proc", b"proc", 0, None)
        and libc.mount(b"none", b"/proc", b"tmpfs", 0, b"size=0,mode=555")
    )


class Served:
    """Serves the objects of the completion's code to the tests in the other process.

    A reply is plain data, a `ref` (the number of an object that stays in this process), or an error.
    """

    def __init__(self, channel: Any) -> None:
        self._channel, self._objects = channel, []

    def describe(self, value: Any) -> Any:
        return encode(value, self._refer)

    def _refer(self, value: Any) -> dict[str, Any]:
        if type(value) is type(sys) and value.__name__ in sys.stdlib_module_names:
            return {"module": value.__name__}
        self._objects.append(value)
        return {"ref": [len(self._objects) - 1, callable(value)]}

    def _resolve(self, data: dict[str, Any]) -> Any:
        if "ref" in data:
            return self._objects[data["ref"][0]]
        number = data["callback"]
        return lambda *arguments, **named: self._call_back(number, arguments, named)

    def _call_back(self, number: int, arguments: Any, named: Any) -> Any:
        """Ask the process of the tests to call a function that it passed to this process as an argument; return the result."""
        self._channel.send({"callback": number, "arguments": self.describe(arguments), "named": self.describe(named)})
        return self._read(self.serve_until_reply())

    def serve_until_reply(self) -> Any:
        while "reply" not in (message := self._channel.receive()):
            self.answer(message)
        return message["reply"]

    def _read(self, data: Any) -> Any:
        return decode(data, self._resolve)

    def answer(self, request: dict[str, Any]) -> None:
        arguments = self._read(request["arguments"])
        try:
            value = OPERATIONS[request["operation"]](*arguments)
            # Arguments that the code has changed in place are sent back.
            changed = [arguments[1], arguments[2]] if request["operation"] == "call" else None
            self._channel.send({"value": self.describe(value), "changed": self.describe(changed)})
        except (Exception, SystemExit) as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            self._channel.send({"raised": names, "text": str(error)[:1000]})


OPERATIONS = {
    "call": lambda function, arguments, named: function(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda value, key: value[key],
    "setitem": lambda value, key, new: value.__setitem__(key, new),
    "delitem": lambda value, key: value.__delitem__(key),
    "contains": lambda value, item: item in value,
    "len": len,
    "iter": iter,
    "next": next,
    "str": str,
    "repr": repr,
}


def main() -> None:
    descriptor, seconds, size, must_be_confined = map(int, sys.argv[1:5])
    if not confine() and must_be_confined:
        sys.exit(3)
    limit_resources(seconds, size)
    sys.argv = ["completion.py"]
    served = Served(Channel(socket.socket(fileno=descriptor)))
    space: dict[str, Any] = {"__name__": "__main__"}
    with open("completion.py", encoding="utf-8") as file:
        code = file.read()
    exec(compile(code, "completion.py", "exec"), space)  # noqa: S102 - which is the purpose
    names = {name: served.describe(value) for name, value in space.items() if not name.startswith("__")}
    served._channel.send({"names": names})
    while True:
        served.answer(served._channel.receive())


if __name__ == "__main__":
    main()
