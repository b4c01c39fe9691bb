"""The random generators of a training process: those of Python, numpy, and torch on the CPU and on the GPU.

Dropout draws numbers from these generators. A checkpoint restores their state, so that a resumed run draws the same
numbers as an uninterrupted run.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """Return the state of all generators as JSON-serialisable types."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": ["MT19937", np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore all generators from the result of `rng_state`.

    The GPU's generator is restored only if the state contains one and this machine has a GPU.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seed all generators from seed, rank and step. A run that resumes at this step always draws the same numbers."""
    words = np.random.SeedSequence((seed, rank, step)).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]) % 2**32)
    torch.manual_seed(int(words[1]) >> 1)  # also seeds the GPU generator
