"""Run a function as the ranks of a process group. The ranks are forked from a process that has imported torch already.

A process that begins from nothing spends some ten seconds of CPU time on imports, and the tests start dozens of ranks.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

PRELOADED = [
    "dpo_ray.models.build",
    "dpo_ray.train.checkpoint.checkpoint",
    "dpo_ray.train.export",
    "dpo_ray.train.loop",
]


def run_ranks(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Call `function(rank, world, *arguments)` in `world` processes that are the ranks of one gloo group.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the others are ended.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="ranks-") as place:
        torch.multiprocessing.start_processes(
            _run_rank, args=(function, world, place, arguments), nprocs=world, start_method="forkserver"
        )


def _run_rank(rank: int, function: Callable[..., None], world: int, place: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=rank, world_size=world)
    function(rank, world, *arguments)
    dist.barrier()  # gloo may abort a rank that ends while another still works
    dist.destroy_process_group()
