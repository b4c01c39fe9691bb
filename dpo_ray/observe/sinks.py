"""Where metrics go while training runs: metrics.jsonl, always, and TensorBoard where the recipe asks for it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dpo_ray.artifacts.storage import Storage

from .progress import Bar


class MetricsSinks:
    """The live metrics of one run, written by its driver.

    On a disk, metrics.jsonl grows line by line; on an object store, which cannot append, it is written as a whole when
    training ends. What a resumed run measures again replaces what it had said before.
    """

    def __init__(self, run_dir: Storage, trackers: Sequence[str]) -> None:
        self._run_dir, self._trackers = run_dir, trackers
        self._rows: dict[int, dict[str, float]] = {}
        self._board: Any = None  # tensorboardX's writer

    def __enter__(self) -> MetricsSinks:
        return self

    def begin(self, known: Sequence[dict[str, float]]) -> None:
        """Begin with what the checkpoint that training goes on from has measured, and with nothing else.

        The checkpoint's rows are complete; what this file held may lack the last moments before a crash, or be of another
        recipe under the same name. Call it before `write`.
        """
        self._rows = {int(row["step"]): row for row in known}
        self._write_all()
        if "tensorboard" in self._trackers and self._run_dir.is_local:
            from tensorboardX import SummaryWriter

            if self._board is not None:
                self._board.close()
            self._board = SummaryWriter(
                str(self._run_dir.local_path() / "tensorboard"),
                purge_step=0,  # TensorBoard hides what earlier attempts wrote: all of it is written again
                filename_suffix=f".{time.time_ns()}",  # two within a second would be one file, the first one lost
            )
            for row in known:
                self._add_to_board(row)

    def write(self, row: dict[str, float]) -> None:
        """Take one step's metrics."""
        step = int(row["step"])
        self._rows[step] = row
        if self._run_dir.is_local:
            with Path(self._run_dir.local_path("metrics.jsonl")).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        self._add_to_board(row)

    def _add_to_board(self, row: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()
        if self._rows:
            self._write_all()

    def _write_all(self) -> None:
        self._run_dir.write(
            "metrics.jsonl", "".join(json.dumps(self._rows[s]) + "\n" for s in sorted(self._rows)).encode()
        )


def follow(sinks: MetricsSinks, bar: Bar, row: dict[str, Any]) -> None:
    """Show and keep one row of training metrics; a worker's first row says where it begins."""
    if "restored_step" in row:
        sinks.begin(row["known"])
        bar.begin_at(row["restored_step"])
        if row["restored_step"]:
            bar.say(f"going on from the checkpoint of step {row['restored_step']:.0f}")
        return
    if "waiting_for" in row:
        what = (
            f"step {row['step']:.0f}" if row["waiting_for"] == "train" else f"the held-out data `{row['waiting_for']}`"
        )
        bar.say(f"{what} is not scored yet: training waits for it")
        return
    sinks.write(row)
    heldout = f", held-out accuracy {row['eval_rewards/accuracies']:.3f}" if "eval_rewards/accuracies" in row else ""
    shown = {"loss": ".4f", "rewards/margins": "+.3f", "rewards/accuracies": ".2f"}  # of unpaired data there are fewer
    names = {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    words = ", ".join(f"{names.get(n, n)} {row[n]:{form}}" for n, form in shown.items() if n in row)
    bar.advance(1, f"{words}{heldout}, {row['tokens_per_second']:,.0f} tokens/s")
