"""TRL's side of the benchmark `reference.py`: runs in TRL's own environment, and scores chunks of pairs when told to.

What is timed is DPOTrainer._precompute_ref_logps, which `precompute_ref_log_probs=True` runs: batches of padded pairs through
the model, the sums gathered, and written beside the data set. The token ids are dpo_ray's own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports] - of its own environment

from benchmarks.common.turns import Answer, answer_tasks

ONE_PAIR = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}  # the trainer wants a data set to be made with


def main() -> None:
    args = _arguments()
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    torch.set_num_threads(args.cores)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = DPOConfig(
        output_dir=str(args.scratch / "trainer"),
        max_length=args.max_length_tokens,
        precompute_ref_log_probs=True,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    trainer = DPOTrainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_dict(ONE_PAIR), processing_class=tokenizer
    )
    batch_size = config.precompute_ref_batch_size or config.per_device_train_batch_size

    def work(task: dict[str, Any]) -> Answer:
        pairs = json.loads(Path(task["pairs"]).read_text())
        rows = datasets.Dataset.from_dict({name: [pair[name] for pair in pairs] for name in pairs[0]})
        began = time.perf_counter()
        scored = trainer._precompute_ref_logps(rows, "train", batch_size)
        seconds = time.perf_counter() - began
        sums = [[float(row["ref_chosen_logps"]), float(row["ref_rejected_logps"])] for row in scored]
        return {"seconds": seconds, "sums": sums}

    about = {"batch_size": batch_size, "versions": {name: version(name) for name in ("trl", "transformers", "torch")}}
    answer_tasks(about, work)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--scratch", required=True, type=Path)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--max-length-tokens", type=int, default=1024)
    return parser.parse_args()


if __name__ == "__main__":
    main()
