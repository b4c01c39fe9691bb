"""Encode the same rendered rows with the cache of words (`byte_bpe`) and with the tokenizer's own batch encoding.

    python -m benchmarks.encode --hh 'hh/train-*.jsonl.gz' --tokenizer models/my-model
    python -m benchmarks.encode --hh 'hh/train-*.jsonl.gz' --tokenizer models/my-model --rounds 5

Both sides are `Encoder` in this process, with one thread as a Ray task has, turn by turn on the same rows; what differs is
whether it may use `Words`. The ids must be equal. A first pass of the cached side is timed alone, as its cache is empty then.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import json
import os
import statistics
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from transformers import AutoTokenizer

from benchmarks.common.machine import machine
from dpo_ray.data.tokenizing.chat import Rendered
from dpo_ray.data.tokenizing.encode import Encoder

BATCH = 256  # groups, as the tokenizing tasks take them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", required=True, help="files of HH-RLHF, as published")
    parser.add_argument("--tokenizer", required=True, help="directory of a fast tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)
    rendered = [as_rendered(chosen, rejected) for chosen, rejected in rows(args.hh)]
    cached, plain = Encoder(tokenizer, plain=True), Encoder(tokenizer, plain=True)
    assert cached._words is not None, "the cache does not support this tokenizer"
    plain._words = None
    first, ids = timed(cached, rendered)
    seconds: dict[str, list[float]] = {"cached": [], "plain": []}
    for _ in range(args.rounds):
        for name, encoder in (("plain", plain), ("cached", cached)):
            took, found = timed(encoder, rendered)
            assert found == ids
            seconds[name].append(took)
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    ratio = statistics.median(p / c for p, c in zip(seconds["plain"], seconds["cached"], strict=True))
    print(f"{len(rendered):,} pairs, vocabulary {len(tokenizer):,}, {machine(1)}")
    print(f"tokenizer's own: {medians['plain']:.2f} s; cached: {medians['cached']:.2f} s, first pass {first:.2f} s")
    print(f"ratio {ratio:.2f}, of the first pass {medians['plain'] / first:.2f}")


def rows(pattern: str) -> list[tuple[str, str]]:
    found = []
    for path in sorted(glob.glob(pattern)):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            found += [(row["chosen"], row["rejected"]) for row in map(json.loads, stream)]
    return found


def as_rendered(chosen: str, rejected: str) -> Rendered:
    """Return a pair as text: the prompt is what both share, up to the last turn of the assistant."""
    shared = os.path.commonprefix([chosen, rejected])
    prompt = shared[: shared.rfind("\n\nAssistant:") + len("\n\nAssistant:")]
    return Rendered(prompt, [chosen, rejected])


def timed(encoder: Encoder, rendered: list[Rendered]) -> tuple[float, list[object]]:
    began, ids = time.perf_counter(), []
    for i in range(0, len(rendered), BATCH):
        ids += encoder.encode(rendered[i : i + BATCH])
    return time.perf_counter() - began, ids


if __name__ == "__main__":
    main()
