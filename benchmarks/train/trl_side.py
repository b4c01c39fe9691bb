"""TRL's side of the benchmark `train.py`: DPOTrainer with precomputed references, in a process and environment of its own.

What is timed is DPOTrainer.train() between the end of the last step that is not counted and the end of the last step:
collating the batch, forward, backward, TRL's measures, clipping, AdamW, the callbacks. Nothing is logged, saved or evaluated.
The token ids and the reference's log-probs (summed over completions, as TRL keeps them) are dpo_ray's own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports] - of its own environment

from benchmarks.train.rows import PairRow, read_rows

ONE_PAIR = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}  # the trainer wants a data set to be made with


def main() -> None:
    args = _arguments()
    logging.getLogger("trl").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    answer = timed_steps(
        model,
        tokenizer,
        read_rows(args.rows),
        args.scratch,
        pairs_per_step=args.pairs_per_step,
        micro_batch=args.micro_batch,
        warm_up_steps=args.warm_up_steps,
        learning_rate=args.learning_rate,
        settings={"use_cpu": True, "bf16": False, "gradient_checkpointing": False},
    )
    print(json.dumps(answer | {"load": os.getloadavg()[0]}))


class _Trainer(DPOTrainer):
    """Notes the loss of every micro-batch."""

    micro_losses: list[torch.Tensor]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.micro_losses.append(loss)
        return loss


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ended: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended.append(time.perf_counter())
        self.cpu.append(time.process_time())


def timed_steps(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[PairRow],
    scratch: Path,
    *,
    pairs_per_step: int,
    micro_batch: int,
    warm_up_steps: int,
    learning_rate: float,
    settings: dict[str, Any],
) -> dict[str, object]:
    """Train on the rows in their order; returns the seconds of the counted steps, and the loss of every step.

    Args:
        micro_batch: pairs in one forward pass.
        settings: further ones of DPOConfig, of the device.
    """
    datasets.disable_progress_bars()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = DPOConfig(
        output_dir=str(scratch / "trainer"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=pairs_per_step // micro_batch,
        max_length=None,
        num_train_epochs=1,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        beta=0.1,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    clock = _Clock()
    trainer = _Trainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_dict(ONE_PAIR),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.micro_losses = []
    trainer.train_dataset = datasets.Dataset.from_list(
        [
            {
                "prompt_ids": row.prompt_ids,
                "chosen_ids": row.chosen_ids,
                "rejected_ids": row.rejected_ids,
                "ref_chosen_logps": sum(row.reference_chosen),
                "ref_rejected_logps": sum(row.reference_rejected),
            }
            for row in rows
        ]
    )
    trainer.train()
    # The loss of a micro-batch is divided by their number already.
    losses = torch.stack(trainer.micro_losses).reshape(-1, pairs_per_step // micro_batch).sum(dim=1).tolist()
    first = warm_up_steps - 1
    return {
        "seconds": clock.ended[-1] - clock.ended[first],
        "cpu_seconds": clock.cpu[-1] - clock.cpu[first],
        "losses": losses,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True, type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--scratch", required=True, type=Path)
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--warm-up-steps", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
