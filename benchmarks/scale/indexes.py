"""Run the two pieces of the data plane that hold something of every row: the store's index and the rules over all rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dpo_ray.config.data import RulesConfig
from dpo_ray.data.rules import Candidates, Outcome, select
from dpo_ray.reference.store.index import KEY, StoreIndex


def indexing(keys: int, keys_per_segment: int) -> Callable[[], int]:
    """Prepare `StoreIndex.of` of random keys and the look-up of some; it returns how many it found."""
    rng = np.random.default_rng(0)
    columns = [
        np.frombuffer(rng.bytes(KEY.itemsize * keys_per_segment), KEY)
        for _ in range(math.ceil(keys / keys_per_segment))
    ]
    names = [f"segment-{i}" for i in range(len(columns))]
    return lambda: int(StoreIndex.of(names, columns).find(columns[0]).sum())


def selecting(rows: int) -> Callable[[], int]:
    """Prepare `select` on random rows, none of which is left out; it returns the rows that it admits."""
    rng = np.random.default_rng(0)
    ids, prompts = (np.frombuffer(rng.bytes(16 * rows), "S16") for _ in range(2))
    everything = Candidates(ids, prompts, ids, np.zeros(rows, np.int32))
    return lambda: int((select(everything, None, RulesConfig(), [None], [None]) == Outcome.ADMITTED).sum())
