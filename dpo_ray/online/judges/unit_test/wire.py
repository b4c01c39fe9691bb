"""Messages between the process that runs a completion's code and the process that runs its tests.

Both programs contain the code of this file, so the file imports nothing of dpo_ray. Messages are JSON, which cannot make the reader run
code. Plain data is None, booleans, numbers, texts, bytes, and lists, tuples, sets and dicts of them. Any other object
stays in its process, and the other process gets a number that refers to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

MOST_BYTES = 16 << 20  # of a message
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
sys.set_int_max_str_digits(0)


def encode(value: Any, refer: Callable[[Any], dict[str, Any]]) -> Any:
    """Encode a value as JSON data. An object of a subclass of a plain type is sent as the plain type.

    Args:
        refer: encodes an object that is not plain data, as a reference to it.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return {"str": str.__str__(value).encode("utf-8", "surrogatepass").hex()}
    if isinstance(value, int):
        return {"int": str(int.__int__(value))}
    if isinstance(value, float):
        return {"float": float.__repr__(value)}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(k, refer), encode(v, refer)] for k, v in dict.items(value)]}
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item, refer) for item in kind.__iter__(value)]}
    return refer(value)


def decode(data: Any, resolve: Callable[[dict[str, Any]], Any]) -> Any:
    """Decode the result of `encode`.

    Args:
        resolve: returns the object for a reference.
    """
    if not isinstance(data, dict):
        return data
    ((name, inner),) = data.items()
    match name:
        case "str":
            return bytes.fromhex(inner).decode("utf-8", "surrogatepass")
        case "int":
            return int(inner)
        case "float":
            return float(inner)
        case "complex":
            return complex(float(inner[0]), float(inner[1]))
        case "bytes":
            return bytes.fromhex(inner)
        case "dict":
            return {decode(k, resolve): decode(v, resolve) for k, v in inner}
    if name in _SEQUENCES:
        return _SEQUENCES[name](decode(item, resolve) for item in inner)
    return resolve(data)


class Channel:
    """Sends and receives messages over a socket, one message per line."""

    def __init__(self, connection: Any) -> None:
        self._file = connection.makefile("rwb")

    def send(self, message: Any) -> None:
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()

    def receive(self) -> Any:
        """Return the next message.

        Raises:
            EOFError: the other process has ended, or a message is too long.
        """
        line = self._file.readline(MOST_BYTES)
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)
