"""Reward against divergence, both exact, of offline DPO, online DPO and best-of-n, under the frontier that no policy passes.

    python -m benchmarks.frontier --out docs/frontier.svg      # five betas; some minutes on two cores
    python -m benchmarks.frontier --quick                      # two betas, a fifth of the pairs; about a minute
    python -m benchmarks.frontier --betas 0.3 --seed 1

In miniature what Rafailov et al. (2023, 2305.18290, section 6.1) draw of sentiment: here every response is known, so nothing is
estimated. Ends with status 1 if a policy lies beyond the frontier, which only a bug explains.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common.figure_style import STYLE
from benchmarks.common.machine import machine
from benchmarks.frontier.policy import aligned, exact, make_reference, make_reward, token_table
from benchmarks.frontier.world import World
from dpo_ray.models.token_logps import TokenLogps

BETAS, PAIRS, EPOCHS, ROUNDS = (0.1, 0.2, 0.3, 0.5, 1.0), 20_000, 5, 4
QUICK_BETAS, QUICK_PAIRS = (0.3, 1.0), 4_000
BEST_OF = tuple(2**k for k in range(1, 11))  # 2 to 1,024; of 1 it is the reference, at the origin
Method = Literal["offline DPO", "online DPO", "optimum", "best of n"]
DRAWN: dict[Method, tuple[str, str]] = {
    "offline DPO": ("#d05a00", "o"),
    "online DPO": ("#0069b4", "s"),
    "best of n": ("#6b7280", "^"),
    "optimum": ("#00875f", "D"),
}


@dataclass(frozen=True)
class Point:
    """One policy, measured; `setting` is its beta, or the n of best-of-n."""

    method: Method
    setting: float
    kl: float
    reward: float
    frontier: float  # the most reward at this KL
    share_of_optimum: float | None  # J / J*; best-of-n has no beta to ask for one
    is_beyond: bool


@dataclass(frozen=True)
class Made:
    """The world of a seed, and the model that is its reference."""

    world: World
    reference: TokenLogps
    token_logps: Tensor  # the reference's, of every response


def make(seed: int) -> Made:
    torch.set_num_threads(1)  # here and in `trained`: the layers are too small for more
    generator = torch.Generator().manual_seed(100 + seed)
    reference = make_reference(seed, generator)
    token_logps = token_table(reference)
    table = exact(token_logps)
    return Made(World(table, make_reward(table, generator)), reference, token_logps)


def measured(world: World, method: Method, setting: float, policy: Tensor) -> Point:
    kl = world.divergence(policy)
    share = None if method == "best of n" else world.objective(policy, setting) / world.optimum(setting)
    return Point(method, setting, kl, world.reward_of(policy), world.frontier(kl), share, world.is_beyond(policy))


def trained(made: Made, method: Method, beta: float, pairs: int, seed: int) -> Point:
    torch.set_num_threads(1)
    policy = aligned(
        made.reference,
        made.token_logps,
        made.world.reward,
        beta,
        rounds=ROUNDS if method == "online DPO" else 1,
        pairs=pairs,
        epochs=EPOCHS,
        generator=torch.Generator().manual_seed(200 + seed),
    )
    return measured(made.world, method, beta, policy)


def all_points(made: Made, betas: list[float], pairs: int, seed: int, cores: int) -> list[Point]:
    """Measure all policies: by beta, then best-of-n. Trainings run in as many processes as cores, one thread each."""
    asked: list[tuple[Method, float]] = [(m, beta) for beta in betas for m in ("offline DPO", "online DPO")]
    points = []
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        for point in pool.map(trained, repeat(made), *zip(*asked, strict=True), repeat(pairs), repeat(seed)):
            print(f"  {point.method}, beta {point.setting:g}: KL {point.kl:.3f}, reward {point.reward:.3f}", flush=True)
            points.append(point)
    points += [measured(made.world, "optimum", beta, made.world.tilted(beta)) for beta in betas]
    points.sort(key=lambda point: point.setting)  # stable: methods stay in their order
    return points + [measured(made.world, "best of n", n, made.world.best_of(n)) for n in BEST_OF]


def table(points: list[Point]) -> str:
    """Write the points as a Markdown table."""
    lines = ["| beta | method | KL | reward | reward / frontier's at that KL | J / J* |", "|---|---|---|---|---|---|"]
    for p in points:
        beta, method = (f"{p.setting:g}", p.method) if p.method != "best of n" else ("", f"best of {p.setting:,}")
        of_optimum = "" if p.share_of_optimum is None else f"{p.share_of_optimum:.3f}"
        lines.append(
            f"| {beta} | {method} | {p.kl:.3f} | {p.reward:.3f} | {p.reward / p.frontier:.3f} | {of_optimum} |"
        )
    return "\n".join(lines)


def draw(world: World, points: list[Point], pairs: int, out: Path) -> None:
    """Draw reward over KL: the frontier as a line, policies as marks; those of a beta carry it."""
    labels: dict[Method, str] = {
        "offline DPO": f"offline DPO, {pairs:,} pairs",
        "online DPO": f"online DPO, {pairs:,} pairs in {ROUNDS} rounds",
        "best of n": f"best of n, n = {BEST_OF[0]} to {BEST_OF[-1]:,}",
        "optimum": "optimum of each beta",
    }
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axis = figure.subplots()
        frontier = [world.tilted(b) for b in np.geomspace(1e-2, 1e2, 200)]
        kls, rewards = [world.divergence(p) for p in frontier], [world.reward_of(p) for p in frontier]
        axis.plot(kls, rewards, color=DRAWN["optimum"][0], label="exact frontier")
        for method, (colour, marker) in DRAWN.items():
            own = [p for p in points if p.method == method]
            joined = "none" if method == "optimum" else ":"
            kls, rewards = [p.kl for p in own], [p.reward for p in own]
            axis.plot(kls, rewards, color=colour, marker=marker, markersize=5, linestyle=joined, label=labels[method])
            if method != "best of n":
                _name_betas(axis, own, colour, above=method == "optimum")
        axis.set_xlabel("KL(policy ‖ reference), nats")
        axis.set_ylabel("reward (the reference's: mean 0, deviation 1)")
        axis.set_xlim(0, 1.05 * max(p.kl for p in points))
        axis.set_ylim(bottom=0)
        axis.legend(loc="lower right", frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", metadata={"Date": None})


def _name_betas(axis: Axes, points: list[Point], colour: str, *, above: bool) -> None:
    offset, side = ((-4, 4), "right") if above else ((5, -11), "left")
    for p in points:
        axis.annotate(
            f"{p.setting:g}", (p.kl, p.reward), offset, textcoords="offset points", ha=side, color=colour, size=8
        )


def closeness(points: list[Point]) -> str:
    """Write one line for each way of DPO: how close it came to the frontier."""
    lines = []
    for method in ("offline DPO", "online DPO"):
        of_method = [p for p in points if p.method == method]
        reward = [p.reward / p.frontier for p in of_method]
        optimum = [p.share_of_optimum for p in of_method if p.share_of_optimum is not None]
        lines.append(
            f"{method}: {min(reward):.1%} to {max(reward):.1%} of the most reward at its KL, "
            f"{min(optimum):.1%} to {max(optimum):.1%} of the optimum of its beta"
        )
    return "\n".join(lines)


def main() -> None:
    args = _arguments()
    betas = args.betas or list(QUICK_BETAS if args.quick else BETAS)
    pairs = QUICK_PAIRS if args.quick else PAIRS
    print(f"seed {args.seed}, {pairs:,} pairs, {EPOCHS} epochs, {len(betas)} betas, {args.cores} processes", flush=True)
    made = make(args.seed)
    points = all_points(made, betas, pairs, args.seed, args.cores)
    draw(made.world, points, pairs, args.out)
    print(f"\n{table(points)}\n\n{closeness(points)}")
    beyond = [p for p in points if p.is_beyond]
    for p in beyond:
        print(f"beyond the frontier: {p}", file=sys.stderr)
    print(f"beyond the frontier: {len(beyond)} of {len(points)} policies")
    print(f"{datetime.date.today()}, {machine(args.cores)}; drawn in {args.out}")
    sys.exit(1 if beyond else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two betas, a fifth of the pairs")
    parser.add_argument("--betas", type=float, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/frontier.svg"), help="the picture; default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
