"""Failures against checkpoints: how much of the time is work that stays done.

A training of interval T (seconds of work between checkpoints), pause C of each, delay L until one is committed, and mean time
between failures M loses the work since the newest committed checkpoint, and then R to start again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DAY_SECONDS = 86_400.0
# Llama 3 (2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 GPUs.
INTERRUPTIONS_PER_GPU_DAY = 419 / 54 / 16_384


@dataclass(frozen=True)
class Training:
    """What failures meet; all in seconds."""

    mtbf_seconds: float
    interval_seconds: float
    pause_seconds: float
    commit_seconds: float
    restart_seconds: float

    @property
    def stalled_seconds(self) -> float:
        """Return how long training stands still at each checkpoint for the one before it."""
        return max(0.0, self.commit_seconds - self.interval_seconds)

    @property
    def lost_seconds(self) -> float:
        """Return the work that a failure costs on average, to first order: half an interval, and what is not committed yet."""
        return self.interval_seconds / 2 + self.commit_seconds

    def goodput(self) -> float:
        """Return the share of the time that is work which stays done, exactly, where failures come by chance.

        The k-th checkpoint after a start is committed at k P + L, P the period; a start lasts longer than t with
        probability exp(-t / M). So exp(-L / M) / (exp(P / M) - 1) of them are committed on average in M + R seconds.
        """
        mtbf, period = self.mtbf_seconds, self.interval_seconds + self.pause_seconds + self.stalled_seconds
        committed = math.exp(-self.commit_seconds / mtbf) / math.expm1(period / mtbf)
        return committed * self.interval_seconds / (mtbf + self.restart_seconds)

    def simulated_goodput(self, failures: int, seed: int) -> float:
        """Return the same of drawn failures."""
        lasted = np.random.default_rng(seed).exponential(self.mtbf_seconds, failures)
        period = self.interval_seconds + self.pause_seconds + self.stalled_seconds
        committed = np.maximum(0, (lasted - self.commit_seconds) // period)
        return float(committed.sum() * self.interval_seconds / (lasted + self.restart_seconds).sum())


def young_interval(pause_seconds: float, mtbf_seconds: float) -> float:
    """Return the interval that loses least, to first order: sqrt(2 C M). Young 1974."""
    return math.sqrt(2 * pause_seconds * mtbf_seconds)


def daly_interval(pause_seconds: float, mtbf_seconds: float) -> float:
    """Return the interval that loses least, by Daly's series (2006, equation 37); for C below 2 M."""
    half = pause_seconds / (2 * mtbf_seconds)
    return young_interval(pause_seconds, mtbf_seconds) * (1 + math.sqrt(half) / 3 + half / 9) - pause_seconds


def mtbf_seconds(gpus: int) -> float:
    """Return the mean time between unexpected interruptions of so many GPUs, each as likely as in Llama 3's training."""
    return DAY_SECONDS / (INTERRUPTIONS_PER_GPU_DAY * gpus)
