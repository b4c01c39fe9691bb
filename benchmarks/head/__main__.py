"""Time and memory of the head, forward and backward: dpo_ray's, torch's own fused one, checkpointed chunks, full logits.

Each way runs in a fresh process, so that its peak is its own; ratios are to the full logits of the same run. CPU seconds
(of all threads) say more than seconds where other processes take turns on the cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.common.machine import machine
from dpo_ray.models.head import head_scores

MIB = 1 << 20
Head = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (hidden, weight, target, chunk) -> losses of rows


def full_logits(hidden: Tensor, weight: Tensor, target: Tensor, chunk: int) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="none")


def checkpointed_chunks(hidden: Tensor, weight: Tensor, target: Tensor, chunk: int) -> Tensor:
    parts = zip(hidden.split(chunk), target.split(chunk), strict=True)
    return torch.cat([checkpoint(full_logits, h, weight, t, chunk, use_reentrant=False) for h, t in parts])


def torch_fused(hidden: Tensor, weight: Tensor, target: Tensor, chunk: int) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk)
    return F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)


def dpo_ray_head(hidden: Tensor, weight: Tensor, target: Tensor, chunk: int) -> Tensor:
    return -head_scores(hidden, weight, None, target, chunk).logps


def dpo_ray_with_entropy(hidden: Tensor, weight: Tensor, target: Tensor, chunk: int) -> Tensor:
    return -head_scores(hidden, weight, None, target, chunk, with_statistics=True).logps


WAYS: dict[str, Head] = {
    "full logits, F.cross_entropy": full_logits,
    "checkpointed chunks": checkpointed_chunks,
    "F.linear_cross_entropy": torch_fused,
    "dpo_ray": dpo_ray_head,
    "dpo_ray, with entropy": dpo_ray_with_entropy,
}


def measure(way: str, chunk: int, args: argparse.Namespace, answer: multiprocessing.SimpleQueue) -> None:
    """Run one way in this process; put its seconds, CPU seconds, its peak over the inputs in MiB, and its sums of results."""
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.rows, args.hidden, device=args.device, dtype=dtype).requires_grad_()
    weight = (torch.randn(args.vocabulary, args.hidden, device=args.device) / args.hidden**0.5).to(dtype)
    weight.requires_grad_()
    target = torch.randint(args.vocabulary, (args.rows,), device=args.device)
    by_row = torch.randn(args.rows, device=args.device)
    before, seconds, cpu_seconds = _forget_peak(args.device), [], []
    for _ in range(args.repeats):
        hidden.grad = weight.grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        losses = WAYS[way](hidden, weight, target, chunk)
        (losses.float() * by_row).sum().backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    assert hidden.grad is not None
    assert weight.grad is not None
    sums = [
        float(losses.detach().double().sum()),
        float(hidden.grad.double().norm()),
        float(weight.grad.double().norm()),
    ]
    peak = (_peak(args.device) - before) / MIB
    answer.put((statistics.median(seconds), statistics.median(cpu_seconds), peak, sums))


def _forget_peak(device: str) -> int:
    """Start the watch for the peak; bytes that are held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets VmHWM: man 5 proc
    return _peak(device)


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="besides full logits")
    parser.add_argument("--json", help="write the figures there too")
    args = parser.parse_args()
    spawn, rows = multiprocessing.get_context("spawn"), []
    for way in [way for way in WAYS if way in args.ways or WAYS[way] is full_logits]:
        for chunk in [args.rows] if WAYS[way] is full_logits else args.chunks:
            queue = spawn.SimpleQueue()
            process = spawn.Process(target=measure, args=(way, chunk, args, queue))
            process.start()
            process.join()
            if process.exitcode != 0:
                raise SystemExit(f"{way} failed")
            rows.append((way, chunk, *queue.get()))
    of = torch.cuda.get_device_name() if args.device == "cuda" else machine(args.threads)
    print(f"head, {args.rows} rows x {args.hidden} x {args.vocabulary}, {args.dtype} ({datetime.date.today()}; {of})\n")
    print("| way | chunk | s | x full | CPU s | x full | peak MiB | of full | loss, gradient norms |")
    print("|---|---|---|---|---|---|---|---|---|")
    _, _, seconds, cpu_seconds, mib, _ = rows[0]
    for way, chunk, own, cpu, peak, sums in rows:
        values = ", ".join(f"{s:.6g}" for s in sums)
        times = f"{own:.2f} | {own / seconds:.2f} | {cpu:.2f} | {cpu / cpu_seconds:.2f}"
        print(f"| {way} | {chunk} | {times} | {peak:.0f} | {peak / mib:.1%} | {values} |")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
