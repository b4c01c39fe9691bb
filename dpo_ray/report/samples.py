"""Examples of data for the report: groups decoded from their token ids, and rows that were left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.tables import read_table
from dpo_ray.data.schemas import splits

from .data_page import RenderedCompletion, RenderedSample, TextPiece

PROMPT_TOKENS = 240  # number of a prompt's last tokens that are shown
COMPLETION_TOKENS = 200  # number of a completion's first tokens that are shown
LAST_TOKENS = 12  # number of a completion's last tokens that are shown
MAX_COMPLETIONS = 4
_CONTEXT_TOKENS = 4  # preceding tokens that a tokenizer may need to decode a token correctly
_CHARACTER_TOKENS = 8  # limit of the tokens that make up one character


def rendered_samples(tokens: Artifact, tokenizer: PreTrainedTokenizerBase, count: int) -> list[RenderedSample]:
    """Decode `count` preference groups, spread over the sources of the data.

    They are a random sample of the first file of each source, and the same sample every time.
    """
    sources = _first_parts(tokens)
    if not sources or count <= 0:
        return []
    shown = sources[:count]
    each = [count // len(shown) + (i < count % len(shown)) for i in range(len(shown))]
    samples = []
    for (split, source, name), wanted in zip(shown, each, strict=True):
        table = read_table(tokens, name)
        fair = table.sort_by("group_id").slice(0, wanted)  # group ids are hashes, so their order is random
        samples += [_rendered(row, split, source, tokenizer) for row in fair.to_pylist()]
    return samples


def quarantine_examples(tokens: Artifact, per_reason: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Return the first rows that were left out for each reason, as records of the schema QUARANTINE.

    Each record also has `part`, the name of the artifact's file with this record.
    """
    left = Counter[str]()
    for account in tokens.manifest.figures["accounts"]:
        left.update(account["reasons"])
    left = Counter({reason: min(count, per_reason) for reason, count in left.items()})
    examples: dict[str, list[dict[str, Any]]] = {}
    for name in tokens.names("quarantine/"):
        if not any(left.values()):
            break  # a large data set has thousands of files, and the first few suffice
        table = read_table(tokens, name)
        wanted = [reason for reason, count in left.items() if count]
        for row in table.filter(pc.field("reason").isin(wanted)).to_pylist():
            if left[row["reason"]]:
                left[row["reason"]] -= 1
                examples.setdefault(row["reason"], []).append({**row, "part": name})
    return examples


def group_text(shard: Artifact, part: str, group_id: bytes, tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode the end of a group's prompt and the beginning of its completions; return "" if the group is missing."""
    name = f"groups/{part}"
    if name not in shard.names(name):
        return ""
    table = read_table(shard, name, ["group_id", "prompt_ids", "completion_ids"])
    matches = table.filter(pc.field("group_id") == pa.scalar(group_id, pa.binary(16))).slice(0, 1).to_pylist()
    if not matches:
        return ""
    texts = [_decoded(tokenizer, matches[0]["prompt_ids"][-40:])]
    texts += [_decoded(tokenizer, ids[:24]) for ids in matches[0]["completion_ids"][:2]]
    return " | ".join(" ".join(text.split()) for text in texts)


def _first_parts(tokens: Artifact) -> list[tuple[str, str, str]]:
    """List the first file (part) of each source as (split, source, file), with the training data first."""
    by_split: dict[str, list[tuple[str, str, str]]] = {}
    for split in splits(tokens):
        seen = set()
        names = tokens.names(f"{split}/")
        first_of_shard = {name.split("/")[1].split("-")[0]: name for name in reversed(names)}
        for account in tokens.manifest.figures["accounts"]:
            name = first_of_shard.get(f"{account['index']:05d}")
            if account["split"] == split and account["source"] not in seen and name is not None:
                seen.add(account["source"])
                by_split.setdefault(split, []).append((split, account["source"], name))
    return [part for parts in by_split.values() for part in parts]


def _rendered(row: dict[str, Any], split: str, source: str, tokenizer: PreTrainedTokenizerBase) -> RenderedSample:
    prompt = row["prompt_ids"]
    probability = row["preference_probability"]
    notes = [f"chosen better with probability {probability:.2f}"] if row["chosen"] and probability != 1.0 else []
    notes += [f"weight {row['weight']:g}"] if row["weight"] != 1.0 else []
    if (hidden := _own_completions(row) - MAX_COMPLETIONS) > 0:
        notes.append(f"{hidden} more completions")
    return RenderedSample(
        split=split,
        source=source,
        note=", ".join(notes),
        prompt_tokens=len(prompt),
        hidden_tokens=max(0, len(prompt) - PROMPT_TOKENS),
        prompt=pieces(prompt[-PROMPT_TOKENS:], tokenizer),
        completions=[_completion(row, k, tokenizer) for k in range(min(MAX_COMPLETIONS, _own_completions(row)))],
    )


def _own_completions(row: dict[str, Any]) -> int:
    """Count the completions of the group's own prompt. A completion of another prompt may follow; its score is NaN."""
    return sum(not math.isnan(score) for score in row["scores"])


def _completion(row: dict[str, Any], k: int, tokenizer: PreTrainedTokenizerBase) -> RenderedCompletion:
    ids, label = row["completion_ids"][k], _label(row, k)
    first = ids if len(ids) <= COMPLETION_TOKENS + LAST_TOKENS else ids[:COMPLETION_TOKENS]
    last = [] if first is ids else ids[-LAST_TOKENS:]
    return RenderedCompletion(
        label=label,
        role="rejected" if label.startswith(("rejected", "undesirable")) else "chosen",
        tokens=len(ids),
        pieces=pieces(first, tokenizer),
        hidden_tokens=len(ids) - len(first) - len(last),
        last_pieces=pieces(last, tokenizer),
        ended=ids[-1] in _special_ids(tokenizer),
    )


def _label(row: dict[str, Any], k: int) -> str:
    score, several = row["scores"][k], _own_completions(row)
    if several == 1:
        return "desirable" if score > 0.5 else "undesirable"
    if several == 2 and row["chosen"]:
        return "chosen" if k == row["chosen"][0] else "rejected"
    preferred, against = row["chosen"].count(k), row["rejected"].count(k)
    place = f"completion {k + 1} of {several}, score {score:g}"
    if preferred or against:
        return f"{'chosen' if preferred >= against else 'rejected'} · {place}"
    return f"not in a pair · {place}" if row["chosen"] else place


def pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[TextPiece]:
    """Decode token ids one by one. Tokens that only together make up a character (bytes of UTF-8) become one piece."""
    special, pieces, begin = _special_ids(tokenizer), [], 0
    for end in range(1, len(ids) + 1):
        if ids[end - 1] in special and end - begin == 1:
            pieces.append(TextPiece(str(tokenizer.convert_ids_to_tokens(ids[begin])), special=True))
            begin = end
            continue
        context = max(0, begin - _CONTEXT_TOKENS)
        text = _decoded(tokenizer, ids[context:end])[len(_decoded(tokenizer, ids[context:begin])) :]
        follows = end < len(ids) and ids[end] not in special
        if text.endswith("\N{REPLACEMENT CHARACTER}") and follows and end - begin < _CHARACTER_TOKENS:
            continue
        pieces.append(TextPiece(text, tokens=end - begin))
        begin = end
    return pieces


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    marked = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *marked))
