"""The bare engine's side of the benchmark `reference.py`: vLLM's LLM.generate, fed the requests that dpo_ray's scorer makes.

What is timed is `generate` alone: requests are made before the clock, and answers are read (only to count cached tokens) after it.
Sequences that the guard of dpo_ray refuses, and scores again, are not scored again here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from benchmarks.common.turns import Answer, answer_tasks
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.vllm.engine import start_engine


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.cores)
    settings = ScorerSettings(
        "vllm", str(args.model), "float32", "cpu", args.max_length_tokens, None, 0.5, share_prompt=True
    )
    engine = start_engine(settings)

    def work(task: dict[str, Any]) -> Answer:
        sequences = _in_the_scorers_order(json.loads(Path(task["pairs"]).read_text()))
        prompts = [TokensPrompt(prompt_token_ids=prompt + completion) for prompt, completion in sequences]
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            prompt_logprobs=0,
            flat_logprobs=True,
            skip_reading_prefix_cache=not task["share_prompt"],
        )
        engine.reset_prefix_cache()
        began = time.perf_counter()
        outputs = engine.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - began
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        return {"seconds": seconds, "cached_tokens": cached, "tokens": sum(len(p) + len(c) for p, c in sequences)}

    answer_tasks({}, work)


def _in_the_scorers_order(pairs: list[dict[str, list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Longest prompts first, a pair's two completions side by side, as dpo_ray.reference.vllm.scorer sorts them."""
    ordered = sorted(pairs, key=lambda pair: -len(pair["prompt_ids"]))
    return [(pair["prompt_ids"], pair[side]) for pair in ordered for side in ("chosen_ids", "rejected_ids")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--max-length-tokens", type=int, default=1024)
    return parser.parse_args()


if __name__ == "__main__":
    main()
