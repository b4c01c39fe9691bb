"""Make the model directory that both sides load: a tokenizer of real subwords, a chat template, a Llama of no importance."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCABULARY = 32_000
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


def make_model(directory: Path, rows: Iterable[Path], tokenizer_dir: Path | None) -> Path:
    """Write tokenizer and model to `directory`, unless they are there.

    Args:
        rows: JSON Lines files whose text a byte-level BPE is trained on.
        tokenizer_dir: a tokenizer to take instead; it is given ChatML if it has no chat template.
    """
    if (directory / "model.safetensors").exists():
        return directory
    tokenizer = _taken(tokenizer_dir) if tokenizer_dir else _trained(rows)
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
    )
    LlamaForCausalLM(config).save_pretrained(directory)  # written last: its being there says that all is
    return directory


def _trained(rows: Iterable[Path]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
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
