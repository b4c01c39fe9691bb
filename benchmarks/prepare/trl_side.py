"""TRL's side of the benchmark `prepare.py`: runs in TRL's own environment, and writes what it measured as JSON.

What is timed is what DPOTrainer does to a data set when it is made: `datasets.load_dataset` of the files into an empty
cache, then DPOTrainer._prepare_dataset (extract the prompt, add EOS, tokenize, drop what is too long; each a
`Dataset.map` or `filter` whose result is written to the cache as Arrow). Imports, tokenizer and model come before the clock.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402 - the clock first: imports are measured too
import json  # noqa: E402
import logging  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import datasets  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402  # pyright: ignore[reportMissingImports] - of its own environment

from benchmarks.common.process_tree import cpu_seconds  # noqa: E402
from benchmarks.common.row_digests import row_digest  # noqa: E402

IMPORTED = time.perf_counter()


class TimedTrainer(DPOTrainer):
    """DPOTrainer with a clock around the preparation of its data set."""

    prepare_seconds = 0.0

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **kwargs)
        self.prepare_seconds, self.cpu_seconds = time.perf_counter() - began, cpu_seconds()
        return prepared


def main() -> None:
    args = _arguments()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    config = DPOConfig(
        output_dir=str(args.scratch / "trainer"),
        max_length=args.max_length_tokens,
        dataset_num_proc=args.num_proc,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    cpu_before, began = cpu_seconds(), time.perf_counter()
    files = [str(path) for path in args.rows]
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(args.scratch / "cache"))
    load_seconds = time.perf_counter() - began
    trainer = TimedTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    end_id = tokenizer.eos_token_id if args.turns else None
    digests = [
        row_digest(r["prompt_ids"], (r["chosen_ids"], r["rejected_ids"]), args.max_length_tokens, end_id)
        for r in trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    ]
    measured = {
        "rows_in": len(rows),
        "rows_out": len(trainer.train_dataset),
        "seconds": load_seconds + trainer.prepare_seconds,
        "load_seconds": load_seconds,
        "cpu_seconds": trainer.cpu_seconds - cpu_before,
        "import_seconds": IMPORTED - STARTED,
        "versions": {name: version(name) for name in ("trl", "datasets", "transformers", "tokenizers", "torch")},
        "digests": digests,
    }
    args.result.write_text(json.dumps(measured))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--scratch", required=True, type=Path, help="an empty directory, for TRL's cache")
    parser.add_argument("--result", required=True, type=Path)
    parser.add_argument("--num-proc", type=int, help="dataset_num_proc; TRL's default is none")
    parser.add_argument("--max-length-tokens", type=int, default=1024)
    parser.add_argument(
        "--turns", action="store_true", help="the rows are conversations, rendered by the chat template"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
