"""Make the model directory that all sides load: a tokenizer of real subwords, a chat template, a small random Llama."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT_TOKENS = 4096
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Size:
    """How large the vocabulary and the Llama are; two query heads share a key and value head."""

    vocabulary: int = 32_000
    hidden: int = 16
    layers: int = 1
    heads: int = 2


def make_model(directory: Path, rows: Iterable[Path], tokenizer_dir: Path | None, size: Size = Size()) -> Path:
    """Write tokenizer and model to `directory`, unless they are there.

    Args:
        rows: JSON Lines files whose text a byte-level BPE is trained on.
        tokenizer_dir: a tokenizer to take instead; it is given ChatML if it has no chat template.
    """
    if (directory / "model.safetensors").exists():
        return directory
    tokenizer = _taken(tokenizer_dir) if tokenizer_dir else _trained(rows, size.vocabulary)
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.hidden if size.layers == 1 else 3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        max_position_embeddings=CONTEXT_TOKENS,
    )
    LlamaForCausalLM(config).save_pretrained(directory)  # written last: its being there says that all is
    return directory


def _trained(rows: Iterable[Path], vocabulary: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((text for path in rows for text in _texts(path)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=TURN_END, pad_token=END_OF_TEXT)
    tokenizer.chat_template = CHATML
    return tokenizer


def _taken(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    if not tokenizer.chat_template:
        tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START], "eos_token": TURN_END})
        tokenizer.chat_template = CHATML
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _texts(path: Path) -> Iterable[str]:
    with path.open(encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            for value in row.values():
                yield from [value] if isinstance(value, str) else (message["content"] for message in value)
