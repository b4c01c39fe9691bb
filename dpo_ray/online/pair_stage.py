"""The stage `pair`: it builds preference groups from judged completions, and mixes them with older groups.

A group is one prompt with completions and the pairs among them. The artifact has the same form as the tokens artifact
of `prepare` (all groups as token ids, also the held-out groups). So the later stages are the same as in an offline run.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_ray.artifacts.artifact import Artifact
from dpo_ray.artifacts.manifest import FileEntry
from dpo_ray.artifacts.provenance import Provenance
from dpo_ray.artifacts.staging import Staging
from dpo_ray.artifacts.tables import parquet_bytes, read_table
from dpo_ray.config.online import OnlineConfig, RoundPairingConfig
from dpo_ray.data.mismatched import with_mismatched
from dpo_ray.data.schemas import TOKENS, splits
from dpo_ray.errors import DataError
from dpo_ray.online.judges.protocol import Verdict
from dpo_ray.reference.sampling import sample_seed

from .pair_rules import REASONS, Paired, adjusted_scores, pairs_of
from .sample import SampledPrompt, read_samples

ROWS_PER_PART = 2048
OWN = "round-{:03d}"  # source of the groups that a round built itself


def run(
    number: int,
    sampled: Artifact,
    verdicts: Mapping[bytes, Verdict],
    prepared: Artifact,
    earlier: Sequence[Artifact],
    config: OnlineConfig,
    seed: int,
    mismatched_tokens: int | None,
    staging: Staging,
    provenance: Provenance,
) -> Artifact:
    """Build the groups of a round, mix in older groups by `online.mix`, and commit the artifact `pair`.

    Args:
        number: number of the round.
        sampled: the artifact `sample` of the round.
        verdicts: the judge's verdict on each prompt, by the prompt's key.
        prepared: the tokens artifact of `prepare`.
        earlier: the artifacts `pair` of the earlier rounds.
        mismatched_tokens: if given, each group also gets a completion of another prompt; this completion and the
            group's own prompt have at most this number of tokens together.

    Raises:
        DataError: there are fewer pairs than `online.pairing.min_pairs`. The error lists the reasons.
    """
    groups, dropped, pairs = [], Counter[str](), 0
    for prompt in read_samples(sampled):
        verdict = verdicts[prompt.key]
        paired = _paired(prompt, verdict, config, sample_seed(seed, number, prompt.key, -1))
        if paired.dropped is not None:
            dropped[paired.dropped] += 1
            continue
        groups.append(_group(prompt, verdict, paired, config.pairing, OWN.format(number)))
        pairs += len(paired.pairs) or 1
    _check_enough(number, pairs, dropped, config)
    own = pa.Table.from_pylist(groups, schema=TOKENS)
    if mismatched_tokens is not None:  # groups of the data and of earlier rounds have such a completion already
        own = with_mismatched(own, mismatched_tokens)
    tables, mixed = [own], {"own": len(own)}
    for name, share, parts in (
        ("offline", config.mix.offline, _parts([prepared])),
        ("earlier", config.mix.earlier_rounds, _parts(earlier)),
    ):
        wanted = round(len(own) * share / (1 - config.mix.offline - config.mix.earlier_rounds))
        chosen = _chosen(parts, wanted, f"{seed}/{number}/{name}", name == "offline", OWN.format(number))
        tables.append(chosen)
        mixed[name] = len(chosen)
    everything = pa.concat_tables(tables)
    train = everything.take(_firsts(everything["group_id"].to_pylist()))
    entries = [
        staging.write(f"train/part-{i:05d}.parquet", parquet_bytes(part), rows=len(part))
        for i, part in enumerate(train.slice(at, ROWS_PER_PART) for at in range(0, len(train), ROWS_PER_PART))
    ]
    entries += _heldout(prepared, staging)
    rows = {name: count for name, count in prepared.rows.items() if not name.startswith("train/")}
    rows |= {
        "train/rows_in": sampled.rows["prompts"] + len(everything) - len(own),
        "train/admitted": len(train),
        "train/quarantined": sum(dropped.values()),
        "train/duplicates": len(everything) - len(train),
    }
    accounts = [a for a in prepared.manifest.figures["accounts"] if a["split"] != "train"]
    accounts += [{"split": "train", "source": s} for s in sorted({*train["source"].to_pylist()})]
    figures = {"accounts": accounts, "dropped": dict(sorted(dropped.items())), "pairs": pairs, "mixed": mixed}
    return provenance.commit(staging, entries, rows=rows, figures=figures)


def _paired(prompt: SampledPrompt, verdict: Verdict, config: OnlineConfig, seed: int) -> Paired:
    return pairs_of(
        verdict.scores,
        [len(ids) for ids in prompt.completion_ids],
        [not ended for ended in prompt.ended],
        prompt.completion_ids,
        verdict.agreement,
        config.pairing,
        config.sampling.pair_truncated,
        seed,
    )


def _group(
    prompt: SampledPrompt, verdict: Verdict, paired: Paired, config: RoundPairingConfig, source: str
) -> dict[str, Any]:
    """Build the group of a prompt as a row of schema TOKENS.

    It contains the completions that are in a pair or in the ranked list, best first, with the scores by which
    they were ranked.
    """
    adjusted = adjusted_scores(verdict.scores, [len(ids) for ids in prompt.completion_ids], config)
    scores = {i: score for i, score in enumerate(adjusted) if score is not None}
    used = list(paired.listed) or sorted({i for pair in paired.pairs for i in pair}, key=lambda i: (-scores[i], i))
    at = {i: place for place, i in enumerate(used)}
    completions = [list(prompt.completion_ids[i]) for i in used]
    chosen, rejected = ([at[pair[side]] for pair in paired.pairs] for side in (0, 1))
    return {
        "group_id": _content_hash(prompt.prompt_ids, completions, chosen, rejected),
        "source": source,
        "prompt_ids": list(prompt.prompt_ids),
        "completion_ids": completions,
        "scores": [scores[i] for i in used],
        "chosen": chosen,
        "rejected": rejected,
        "preference_probability": _label(scores, paired, config),
        "weight": 1.0,
    }


def _label(scores: Mapping[int, float], paired: Paired, config: RoundPairingConfig) -> float:
    """Return the label of a group: the probability that the better completion is preferred.

    A hard label is 1. Any other label follows from the scores of the group's only pair (Bradley and Terry, 1952).
    """
    if config.labels == "hard":
        return 1.0
    ((better, worse),) = paired.pairs
    return 1.0 / (1.0 + math.exp(scores[worse] - scores[better]))


def _content_hash(prompt: Sequence[int], completions: Sequence[Sequence[int]], *pairs: Sequence[int]) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for ids in (prompt, *completions, *pairs):
        content.update(len(ids).to_bytes(8, "little") + np.asarray(ids, np.int32).tobytes())
    return content.digest()


def _check_enough(number: int, pairs: int, dropped: Mapping[str, int], config: OnlineConfig) -> None:
    if pairs < config.pairing.min_pairs:
        reasons = "; ".join(f"{REASONS[code]} ({count:,} prompts)" for code, count in sorted(dropped.items()))
        raise DataError(
            f"there are {pairs:,} pairs, fewer than online.pairing.min_pairs={config.pairing.min_pairs:,}: {reasons}",
            where=f"round {number}",
            fix="sample more (online.prompts_per_round, online.sampling.samples_per_prompt), at a higher temperature or with "
            "a larger max_new_tokens; or loosen online.pairing",
        )


def _parts(artifacts: Sequence[Artifact]) -> list[tuple[Artifact, str]]:
    return [(artifact, name) for artifact in artifacts for name in artifact.names("train/")]


def _chosen(parts: Sequence[tuple[Artifact, str]], count: int, purpose: str, whole: bool, not_of: str) -> pa.Table:
    """Choose up to `count` groups at random.

    Groups are chosen by a keyed hash of their ids, so the result depends neither on the division into files nor on the
    order of groups and files.

    Args:
        parts: the files of groups to choose from, each with its artifact.
        purpose: text from which the hash key is made.
        whole: True: choose from all groups. False: choose only from groups that rounds built from their own samples.
        not_of: with `whole=False`, the name of a round whose groups are not chosen.
    """
    if not count:
        return TOKENS.empty_table()
    key = hashlib.blake2b(purpose.encode(), digest_size=32).digest()
    ranked: list[tuple[bytes, int, int]] = []
    for number, (artifact, name) in enumerate(parts):
        table = read_table(artifact, name, ["group_id", "source"])
        for row, (group, source) in enumerate(
            zip(*(table[c].to_pylist() for c in ("group_id", "source")), strict=True)
        ):
            if whole or (source.startswith("round-") and source != not_of):
                ranked.append((hashlib.blake2b(group, digest_size=16, key=key).digest(), number, row))
    rows_of: dict[int, list[int]] = {}
    for _, number, row in sorted(ranked)[:count]:
        rows_of.setdefault(number, []).append(row)
    tables = [
        read_table(*parts[number]).select(TOKENS.names).take(sorted(rows)).cast(TOKENS)
        for number, rows in sorted(rows_of.items())
    ]
    return pa.concat_tables([TOKENS.empty_table(), *tables])


def _firsts(ids: Sequence[bytes]) -> list[int]:
    """List the indices of the rows whose id does not occur in an earlier row."""
    return sorted({key: i for i, key in reversed([*enumerate(ids)])}.values())


def _heldout(prepared: Artifact, staging: Staging) -> Iterator[FileEntry]:
    """Copy the held-out groups from the tokens artifact, and yield the manifest entries of the new files.

    Every round's policy is evaluated on these groups.
    """
    for split in splits(prepared):
        for name in prepared.names(f"{split}/") if split != "train" else ():
            yield staging.write(name, prepared.read_bytes(name), rows=prepared.entry(name).rows)
