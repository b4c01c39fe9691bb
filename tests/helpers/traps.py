"""Traps for training workers: one of them is killed, or hangs, at a named point of a step or of a commit, once.

Nothing here is imported when the module is, so that Ray can send these functions to workers that do not find the tests.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Where a worker is killed: its rank, and whether on the way in or out of a function of production code.
POINTS = {
    "before a step": (1, "in", "dpo_ray.train.loop", "train_step"),
    "after the backward pass": (0, "in", "dpo_ray.train.step", "clip_gradients"),
    "after the update": (1, "out", "dpo_ray.train.loop", "train_step"),
    "before the snapshot": (0, "in", "dpo_ray.train.checkpoint.checkpoint", "get_state_dict"),
    "after the snapshot": (1, "in", "torch.distributed.checkpoint.state_dict_saver", "async_save"),
    "as writing begins": (0, "out", "torch.distributed.checkpoint.state_dict_saver", "async_save"),
    "before files are written": (1, "in", "torch.distributed.checkpoint.filesystem.FileSystemWriter", "write_data"),
    "after files are written": (0, "out", "torch.distributed.checkpoint.filesystem.FileSystemWriter", "write_data"),
    "before its file is hashed": (1, "in", "dpo_ray.train.checkpoint.hashing", "digest"),
    "after its file is hashed": (1, "out", "dpo_ray.train.checkpoint.hashing", "digest"),
    "after DCP has finished": (0, "out", "torch.distributed.checkpoint.filesystem.FileSystemWriter", "finish"),
    "before rank 0 hashes the rest": (0, "in", "dpo_ray.train.checkpoint.manifest", "digest"),
    "before the commit": (0, "in", "dpo_ray.train.checkpoint.checkpoint", "commit"),
    "after the commit": (0, "out", "dpo_ray.train.checkpoint.checkpoint", "commit"),
    "after pruning": (0, "out", "dpo_ray.train.checkpoint.checkpoint", "prune"),
}
# One of each kind: in a step, and around a commit.


def arm_trap(root: Path, name: str, action: str, rank: int, on: str, place: str, function: str) -> None:
    """Write a trap into `root`; traps close in the order of their names, one for each attempt of the workers."""
    (root / "points").mkdir(parents=True, exist_ok=True)
    trap = {"action": action, "rank": rank, "on": on, "place": place, "function": function}
    (root / "points" / name).write_text(json.dumps(trap))


def armed_traps(root: Path) -> list[Path]:
    """Return the traps in `root` that have not closed yet."""
    return sorted((root / "points").glob("*")) if (root / "points").exists() else []


def wrap_function(place: Any, name: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Replace a function of a module or class by one that calls `before`, the function and `after`."""
    function = getattr(place, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        before()
        result = function(*arguments, **keywords)
        after()
        return result

    setattr(place, name, wrapped)


def set_next_trap(root: Path, rank: int) -> None:
    """Set the next armed trap in this process, if it is of this rank."""
    traps = armed_traps(root)
    if not traps:
        return
    file, trap = traps[0], json.loads(traps[0].read_text())
    if rank != trap["rank"]:
        return

    def kill() -> None:
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    def hang() -> None:
        file.unlink(missing_ok=True)
        time.sleep(3600)

    def nothing() -> None:
        pass

    try:
        place = importlib.import_module(trap["place"])
    except ModuleNotFoundError:
        module, _, kind = trap["place"].rpartition(".")
        place = getattr(importlib.import_module(module), kind)
    action = {"kill": kill, "hang": hang}[trap["action"]]
    before, after = (action, nothing) if trap["on"] == "in" else (nothing, action)
    wrap_function(place, trap["function"], before, after)
