"""The driver's log on Ray's head, read piece by piece through the API server."""

from __future__ import annotations

from typing import NamedTuple

from dpo_ray.observe.text import harmless

from .client import Cluster, Json
from .execute import execute
from .state import COLOURS

HEAD_CONTAINER = "ray-head"
PIECE_BYTES = 512 << 10
LAST_BYTES = 2048  # of what a driver wrote before somebody began to watch

# $1: the id of the Ray job, $2: the first byte, counted from the end if negative, $3: how many bytes at most
READ = """
log=/tmp/ray/session_latest/logs/job-driver-$1.log
size=$(wc -c < "$log") || exit 3
from=$2
if [ "$from" -lt 0 ]; then from=$((size + from)); fi
if [ "$from" -lt 0 ] || [ "$from" -gt "$size" ]; then from=0; fi
echo "$from"
tail -c "+$((from + 1))" "$log" | head -c "$3"
"""


class Position(NamedTuple):
    """How far a driver's log has been read. Another pod, or another job, has another log."""

    pod: str = ""
    job: str = ""
    first_byte: int = 0


class NewLines(NamedTuple):
    """New lines of a log, where to go on reading, and why nothing can be read, or ""."""

    lines: list[str]
    position: Position
    problem: str = ""


def read(cluster: Cluster, namespace: str, head: Json, job: str, position: Position) -> NewLines:
    """Read the whole lines that the driver of a job wrote after `position`. A problem is returned, because it may pass."""
    pod = head["metadata"]
    if (position.pod, position.job) != (pod["uid"], job):
        position = Position(pod["uid"], job, position.first_byte if not position.pod else 0)
    if not job:
        return NewLines([], position)
    lines: list[str] = []
    while True:
        command = ["sh", "-c", READ, "sh", job, str(position.first_byte), str(PIECE_BYTES)]
        done = execute(cluster, namespace, pod["name"], HEAD_CONTAINER, command)
        if done.code == 3:  # the driver has not written anything yet
            return NewLines(lines, position)
        if done.code != 0:
            return NewLines(lines, position, done.errors)
        first, _, text = done.output.partition(b"\n")
        whole, newline, rest = text.rpartition(b"\n")
        if not newline and len(text) >= PIECE_BYTES:  # an endless line
            whole, newline, rest = text, b"\n", b""
        if position.first_byte < 0 and int(first):  # the first line is not whole
            whole = whole.partition(b"\n")[2]
        if newline:
            lines += [harmless(COLOURS.sub("", line)) for line in whole.decode(errors="replace").split("\n")]
        position = position._replace(first_byte=int(first) + len(text) - len(rest))
        if len(text) < PIECE_BYTES:
            return NewLines(lines, position)
