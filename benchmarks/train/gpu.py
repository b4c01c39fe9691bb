"""Llama shapes with random weights on one device, in bf16: tokens/s and MFU of dpo_ray's step, and of TRL's where it is.

Everything is in this process, one side after the other, on the same weights and rows. It imports torch, transformers, numpy
and pydantic alone (and TRL, if that is installed): neither Ray, vLLM nor pyarrow. What is timed is what `dpo_ray_side.py`
and `trl_side.py` say; master weights are bf16 on both sides.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.train.dpo_ray_side import add_reference, attention, timed_steps
from benchmarks.train.rows import Lengths, PairRow, made_rows, padded_share, token_ratio
from dpo_ray.models.packed_rows import Layout
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.models.work import ModelShape, peak_flops

# Llama 3.2 1B and Llama 3.1 8B: https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json and its like
SHAPES = {
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "1b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
}
# Medians in tokens of Llama's tokenizers, and a deviation of the logarithm with which few reach the longest.
LENGTHS = {"hh": Lengths(110, 50, 60, 0.7), "ultrafeedback": Lengths(110, 320, 260, 0.7)}
LONGEST = {"hh": 1024, "ultrafeedback": 2048}
TOKENS_PER_MICRO_BATCH = 16_384
RECOMPUTED_FROM = 4e9  # parameters: activations of larger models would not fit, so both sides recompute them


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    texts, everything = [], {}
    for kind in args.lengths:
        measured, rows = _measure(kind, device, args)
        everything[kind] = measured
        texts.append(_report(kind, rows, measured, device, args))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    head = f"## train, {args.shape} on {name} ({datetime.date.today()}; torch {torch.__version__})"
    text = "\n\n".join([head, f"Command: `{shlex.join(['python', *sys.argv])}`", *texts])
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"measured": everything, "command": sys.argv, "report": text}, indent=1))


def _measure(kind: str, device: torch.device, args: argparse.Namespace) -> tuple[dict[str, dict], list[PairRow]]:
    longest = min(LONGEST[kind], SHAPES[args.shape].max_position_embeddings)
    count = (args.warm_up_steps + args.steps) * args.pairs_per_step
    rows = made_rows(LENGTHS[kind], count, SHAPES[args.shape].vocab_size, longest)
    rows = add_reference(rows, _model(args.shape, device, attention("shared")))
    measured = {
        "dpo_ray, shared": _with_memory(device, lambda: _dpo_ray(rows, "shared", device, args)),
        "dpo_ray, packed": _with_memory(device, lambda: _dpo_ray(rows, "packed", device, args)),
        "dpo_ray, padded": _with_memory(device, lambda: _dpo_ray(rows, "padded", device, args)),
    }
    if importlib.util.find_spec("trl") is None:
        print("TRL cannot be imported here: its side is left out", file=sys.stderr)
    else:
        measured["TRL"] = _with_memory(device, lambda: _trl(rows, device, args))
    return measured, rows


def _model(shape: str, device: torch.device, implementation: str) -> LlamaForCausalLM:
    """Make the model on the device itself: the same random weights in bf16 each time."""
    torch.manual_seed(0)
    config = SHAPES[shape]
    config._attn_implementation = implementation
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model


def _dpo_ray(rows: Sequence[PairRow], layout: Layout, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    model = _model(args.shape, device, attention(layout))
    if model.num_parameters() > RECOMPUTED_FROM:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = TokenLogps(model, layout=layout).train()
    return timed_steps(
        policy, rows, args.pairs_per_step, args.warm_up_steps, args.learning_rate, TOKENS_PER_MICRO_BATCH
    )


def _trl(rows: Sequence[PairRow], device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.train.trl_side import timed_steps as trl_steps

    model = _model(args.shape, device, "sdpa")
    with tempfile.TemporaryDirectory() as scratch:
        return trl_steps(
            model,
            _tokenizer(),
            rows,
            Path(scratch),
            pairs_per_step=args.pairs_per_step,
            micro_batch=args.trl_micro_batch[0],
            warm_up_steps=args.warm_up_steps,
            learning_rate=args.learning_rate,
            settings={
                "use_cpu": device.type == "cpu",
                "bf16": device.type == "cuda",
                "gradient_checkpointing": model.num_parameters() > RECOMPUTED_FROM,
            },
        )


def _tokenizer() -> Any:
    """Make a tokenizer of three words: the trainer wants one, and the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))  # noqa: S106 - a token of text
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def _with_memory(device: torch.device, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Add the peak memory to an answer, and free what the side held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        answer = work()
        answer["peak_gib"] = torch.cuda.max_memory_allocated() / (1 << 30) if device.type == "cuda" else 0.0
    except torch.OutOfMemoryError as error:
        answer = {"error": str(error).splitlines()[0]}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return answer


def _report(
    kind: str, rows: Sequence[PairRow], measured: dict[str, dict], device: torch.device, args: argparse.Namespace
) -> str:
    counted = rows[args.warm_up_steps * args.pairs_per_step :]
    tokens = sum(2 * p + c + r for p, c, r in (row.lengths for row in counted))
    with torch.device("meta"):
        shape = ModelShape.of(LlamaForCausalLM(SHAPES[args.shape]))
    # Prompts computed twice, padding and recomputation do not count, so the same count serves all sides.
    flops = sum(shape.flops(prompt, completions) for prompt, *completions in (row.lengths for row in counted))
    peak = peak_flops(device)
    lines = [
        f"### lengths of {kind}",
        "",
        f"{len(counted)} pairs in steps of {args.pairs_per_step}, {tokens:,} tokens with each prompt twice, "
        f"{token_ratio(counted):.3f} times as many as with each prompt once; "
        f"{padded_share(counted, args.pairs_per_step):.0%} of padded batches is padding.",
        "",
        "| side | pairs/s | tokens/s | MFU | peak GiB | losses, first to last |",
        "|---|---|---|---|---|---|",
    ]
    for side, answer in measured.items():
        if "error" in answer:
            lines.append(f"| {side} | {answer['error']} | | | | |")
            continue
        mfu = f"{flops / answer['seconds'] / peak:.1%}" if peak else "no peak known"
        lines.append(
            f"| {side} | {len(counted) / answer['seconds']:.2f} | {tokens / answer['seconds']:,.0f} | {mfu} "
            f"| {answer['peak_gib']:.1f} | {answer['losses'][0]:.4f} to {answer['losses'][-1]:.4f} |"
        )
    worst = max(
        (float(np.abs(np.array(a["losses"]) - measured["dpo_ray, shared"]["losses"]).max()) for a in measured.values()
         if "losses" in a and "losses" in measured["dpo_ray, shared"]),
        default=float("nan"),
    )  # fmt: skip
    return "\n".join([*lines, "", f"Largest difference of a step's loss to dpo_ray's: {worst:.1e} (bf16)."])
