"""What Ray prints goes to a file, and what dpo_ray prints stays, to the very end of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DRIVER = """
import logging, os, sys, threading
logging.basicConfig(level=logging.WARNING)
from dpo_ray.observe.ray_output import discard_ray_output, divert_ray_loggers, divert_ray_output, ray_output
logging.getLogger("ray.data").addHandler(logging.StreamHandler())
logging.getLogger("ray").propagate = False
path = divert_ray_output()
assert divert_ray_output() == path and ray_output() is None
divert_ray_loggers()

class Ref:
    def __del__(self):
        raise RuntimeError("No owner found for object")

def rays():
    print("(raylet) a node is lost")
    print("an error of the raylet", file=sys.stderr)
    raise RuntimeError("the poll failed")

thread = threading.Thread(target=rays, name="ray_listen_error_messages")
thread.start()
thread.join()
logging.getLogger("ray.data").error("an exception of Ray Data")
logging.getLogger("dpo_ray").warning("a warning of ours")
os.write(2, b"C++ is about to end\\n")
Ref()
kept, sys.late = Ref(), Ref()
print("a figure")
print(ray_output() == path, path)
print("error: the last words", file=sys.stderr)
if "discard" in sys.argv:
    discard_ray_output()
"""
RAYS = (
    "(raylet) a node is lost",
    "an error of the raylet",
    "the poll failed",
    "an exception of Ray Data",
    "C++ is about to end",
    "No owner found for object",
)


def run(tmp_path: Path, *arguments: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout, done.stderr


def test_rays_output_is_in_the_file_and_the_last_line_is_ours(tmp_path: Path) -> None:
    out, err = run(tmp_path)
    (file,) = tmp_path.glob("dpo-ray-*-ray.log")
    assert out == f"a figure\nTrue {file}\n"
    assert err == "WARNING:dpo_ray:a warning of ours\nerror: the last words\n"
    text = file.read_text()
    assert [line for line in RAYS if line not in text] == []


def test_the_file_of_a_run_that_succeeds_is_deleted(tmp_path: Path) -> None:
    _, err = run(tmp_path, "discard")
    assert err.endswith("error: the last words\n")
    assert not list(tmp_path.iterdir())


def test_streams_in_memory_stay_where_they_are() -> None:
    program = "import io, sys; sys.stderr = io.StringIO(); from dpo_ray.observe.ray_output import *; "
    program += (
        "divert_ray_output(); print('x', file=sys.stderr); discard_ray_output(); print(sys.stderr._own.getvalue())"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "x\n\n"
