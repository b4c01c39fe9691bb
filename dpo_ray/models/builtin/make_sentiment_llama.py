"""Script that trains `sentiment_llama`: a byte-level BPE tokenizer and a Llama of 0.36 M parameters for film reviews.

    python -m dpo_ray.models.builtin.make_sentiment_llama [output directory]

This model is the reference model of the quickstart. A real run would use a supervised fine-tuned model instead. It is trained
on unlabelled reviews of data/synthetic.py, each followed by EOS, until its loss is close to the entropy of the grammar that
generates them. The script takes about a minute on two cores.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_ray.data.synthetic import RULES, documents, entropy_nats

logger = logging.getLogger(__name__)

SEED = 7
VOCABULARY = 704
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
PAD_ID, BOS_ID, EOS_ID = range(3)  # the trainer numbers the special tokens first, in order
CONTEXT_TOKENS = 256
STEPS, DOCUMENTS_PER_STEP, LEARNING_RATE, WARMUP_STEPS = 450, 64, 4e-3, 40
DOCUMENTS_OF_THE_TOKENIZER, HELD_OUT_DOCUMENTS = 8_000, 2_048


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer. It can encode any text, and adds nothing to a text (no BOS, no space).

    A word includes the space before it. So if a completion begins with a space, the ids of prompt + completion are the ids
    of the prompt followed by the ids of the completion.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(documents(DOCUMENTS_OF_THE_TOKENIZER, seed), trainer=trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build an untrained Llama in float32. Like larger models, it has grouped-query attention and tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        dtype="float32",
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Train by next-token prediction on new documents; no document is seen twice."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate_factor)
    started = time.monotonic()
    texts = documents(STEPS * DOCUMENTS_PER_STEP, seed)
    for step, (ids, mask) in enumerate(_batches(texts, tokenizer)):
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            logger.info("step %d  loss %.4f  %.0f s", step, loss.item(), time.monotonic() - started)


@torch.no_grad()
def document_nats(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """Measure the mean negative log-prob, in nats, of a held-out document with its EOS.

    The first token is not counted, because no token before it predicts it; see `floor_nats`.
    """
    nats = 0.0
    for ids, mask in _batches(documents(HELD_OUT_DOCUMENTS, seed), tokenizer):
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        token_logps = logps.gather(-1, ids[:, 1:, None])[..., 0]
        nats -= float((token_logps * mask[:, 1:]).sum())
    return nats / HELD_OUT_DOCUMENTS


def floor_nats(tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the lower bound of `document_nats`: the entropy of the grammar, minus the entropy of the first token."""
    first = [tokenizer.encode(text)[0] for text in RULES["when"]]
    counts = [first.count(token) for token in set(first)]
    return entropy_nats() + sum(c / len(first) * math.log(c / len(first)) for c in counts)


def main(directory: Path) -> None:
    """Make the tokenizer and the model, measure the model, and save both."""
    tokenizer = make_tokenizer(SEED)
    model = make_model(tokenizer, SEED)
    train(model, tokenizer, SEED)
    model.eval()
    nats, floor = document_nats(model, tokenizer, SEED + 1), floor_nats(tokenizer)
    logger.info("%d parameters, %.3f nats per document, floor %.3f", model.num_parameters(), nats, floor)
    model.generation_config = GenerationConfig(
        do_sample=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _learning_rate_factor(step: int) -> float:
    """Return the factor of the learning rate at a step. It rises during the warm-up, then falls as a cosine to nearly 0."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))


def _batches(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (token ids, mask), both [documents, tokens]. Each document is followed by EOS, and padded on the right."""
    while chunk := list(islice(texts, DOCUMENTS_PER_STEP)):
        rows = [torch.tensor([*tokenizer.encode(text), EOS_ID]) for text in chunk]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        yield ids, mask


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "sentiment_llama")
