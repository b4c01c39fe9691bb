"""Log-probs by the forward pass of training, without gradients. They agree with those of training; vLLM is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from dpo_ray.config.train import TrainConfig
from dpo_ray.data.groups import Group
from dpo_ray.models.build import build_policy
from dpo_ray.models.load import load_policy
from dpo_ray.models.packed_rows import packed_rows
from dpo_ray.reference.store.index import first_of_equal
from dpo_ray.reference.store.store import ReferenceStore
from dpo_ray.schedule.files import filler
from dpo_ray.schedule.micro_batch import pack
from dpo_ray.schedule.order import deal, estimate_work

from .granule import Scored, Unscored
from .scorer import ScoreRequest, ScorerSettings


class TrainerScorer:
    """A scorer that runs the frozen model exactly as training does: packed groups, shared prompts, the same kernels.

    In a process group, the model is sharded over the ranks as for training, and all ranks must make the same calls.
    """

    def __init__(
        self, settings: ScorerSettings, train: TrainConfig | None = None, device: torch.device | None = None
    ) -> None:
        """Load the model.

        Args:
            train: settings that limit the size of a forward pass.
            device: the device of this rank; None: the device in `settings`.

        Raises:
            ConfigError: the model or its adapter cannot be loaded.
        """
        train = train or TrainConfig()
        grouped = dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        self.cached_tokens = self.rescored = 0
        self._device = device or torch.device(settings.device)
        self._tokens_per_micro_batch = settings.max_batched_tokens or train.tokens_per_micro_batch
        adapter = None if settings.adapter_dir is None else Path(settings.adapter_dir)
        dtype = getattr(torch, settings.dtype)
        directory = Path(settings.model_dir)
        if grouped:  # as for training: float32 weights, which FSDP2 casts to `dtype` for the forward pass
            plain = {"lora": None, "layout": "shared", "activation_checkpointing": "none", "compile": False}
            policy = build_policy(directory, adapter, train.model_copy(update=plain), dtype, self._device)
        else:
            policy = load_policy(directory, dtype, train.logprob_chunk_tokens, adapter).to(self._device)
        self._policy = policy.eval()

    @torch.no_grad()
    def score_share(self, groups: Sequence[Group]) -> dict[int, list[np.ndarray]]:
        """Score this rank's share of the groups. Collective: all ranks must call this with the same groups.

        Returns:
            A mapping from index into `groups` to the log-probs of each completion, float32 [completion tokens]. Each
                group is in the result of exactly one rank.
        """
        tokens = [g.tokens for g in groups]
        work = [estimate_work(len(g.prompt_ids), [len(c) for c in g.completion_ids]) for g in groups]
        scores: dict[int, list[np.ndarray]] = {}
        for members in deal(tokens, work, self.ranks, self._tokens_per_micro_batch)[self.rank]:
            batch = pack([groups[i] for i in members]) if members else filler()
            rows = packed_rows(batch, self._device, self._policy.layout)
            logps = self._policy(rows).logps.cpu().numpy()
            ends = np.cumsum([len(c) for i in members for c in groups[i].completion_ids], dtype=np.int64)
            parts = iter(np.split(logps, ends[:-1]) if members else [])
            scores |= {i: [next(parts) for _ in groups[i].completion_ids] for i in members}
        return scores

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | None]:
        """Return the log-probs of the completion of each request, in the same order: float32 [completion tokens].

        The result of a request is None if a log-prob is not finite. This method implements `Scorer.score`, and
        works in a single process only.
        """
        members: dict[tuple[int, bytes], list[int]] = {}
        for i, request in enumerate(requests):
            members.setdefault((request.group, request.prompt_ids.tobytes()), []).append(i)
        groups = [
            _group(b"", requests[ids[0]].prompt_ids, [requests[i].completion_ids for i in ids])
            for ids in members.values()
        ]
        self.cached_tokens += sum(_shared_tokens(g) for g in groups)
        scores = self.score_share(groups)
        results: list[np.ndarray | None] = [None] * len(requests)
        for g, ids in enumerate(members.values()):
            for i, logps in zip(ids, scores[g], strict=True):
                results[i] = logps if np.isfinite(logps).all() else None
        return results

    def close(self) -> None:
        """Free the memory of the model."""
        del self._policy


def score_granules(
    scorer: TrainerScorer,
    store: ReferenceStore,
    known: Sequence[str],
    granules: Iterable[pa.Table],
    report: Callable[[Scored], bool],
) -> None:
    """Score granules and commit their log-probs to the store.

    Collective: all ranks must call this with the same granules. For each granule, each rank scores its share of the
    groups and commits it as one segment (file). Completions that a previous attempt has committed are not scored again.

    Args:
        known: segments of the store that contain no completion of these granules; these segments are not searched.
        granules: tables of schema GRANULE.
        report: called on rank 0 for each granule when all its log-probs are in the store. If `report` returns False, no
            further results are needed, and all ranks return.

    Raises:
        ArtifactError: the store cannot be read or written.
    """
    new = sorted(set(store.segments()) - set(known)) if scorer.rank == 0 else []
    index, listening = store.index(new) if scorer.rank == 0 else None, True
    for number, granule in enumerate(granules):
        began, keys = time.monotonic(), store.keys(granule)
        different = first_of_equal(keys)
        # Rank 0 looks up for all ranks. If each rank did, other writers could cause different results, and a deadlock.
        missing = _from_rank_0(different & ~index.find(keys) if index is not None and listening else None)
        if missing is None:
            return
        groups, completions = _missing_groups(granule, missing)
        failed = _gathered(_commit(store, scorer.score_share(groups), [keys[c] for c in completions]))
        if scorer.rank:
            continue
        scored = Scored(
            groups=len(granule),
            sequences=int(different.sum()) - len(failed),
            tokens=sum(len(g.prompt_ids) * len(g.completion_ids) + sum(map(len, g.completion_ids)) for g in groups),
            cached_tokens=sum(_shared_tokens(g) for g in groups),
            rescored=0,
            seconds=time.monotonic() - began,
            engine=f"trainer of {scorer.ranks}",
            unscored=_unscored(granule, keys, failed) if failed else (),
            granule=number,
        )
        listening = report(scored)


def _commit(store: ReferenceStore, scores: dict[int, list[np.ndarray]], keys: Sequence[np.ndarray]) -> list[bytes]:
    """Append a rank's finite log-probs to the store; return the keys of the completions without finite log-probs."""
    finite: dict[bytes, np.ndarray] = {}
    failed: list[bytes] = []
    for g, token_logps in scores.items():
        for key, logps in zip(keys[g], token_logps, strict=True):
            if np.isfinite(logps).all():
                finite[key.tobytes()] = logps
            else:
                failed.append(key.tobytes())
    if finite:
        store.append(list(finite), list(finite.values()))
    return failed


def _unscored(granule: pa.Table, keys: np.ndarray, failed: Sequence[bytes]) -> tuple[Unscored, ...]:
    """List the groups of a granule that contain a completion without finite log-probs.

    Args:
        keys: keys of all completions of the granule.
        failed: keys of the completions without finite log-probs.
    """
    counts = granule["completion_ids"].combine_chunks().value_lengths().to_numpy()
    group_of = np.repeat(np.arange(len(granule)), counts)  # [completions]
    without = set(failed)
    rows = sorted({int(g) for g, key in zip(group_of, keys, strict=True) if key.tobytes() in without})
    ids = granule["group_id"].take(pa.array(rows, pa.int64())).to_pylist()
    return tuple(Unscored(i, "no_log_probs", "scored by the trainer's own forward pass") for i in ids)


def _missing_groups(granule: pa.Table, missing: np.ndarray) -> tuple[list[Group], list[np.ndarray]]:
    """Select the groups of a granule that have missing completions, and keep only these completions.

    Args:
        missing: bool [completions], for all completions of the granule.

    Returns:
        The groups; and for each group, the positions of its completions among all completions of the granule.
    """
    groups, positions, first = [], [], 0
    for row in range(len(granule)):
        completions = [c.values.to_numpy() for c in granule["completion_ids"][row].values]
        of_group = first + np.flatnonzero(missing[first : first + len(completions)])
        if len(of_group):
            prompt = granule["prompt_ids"][row].values.to_numpy()
            selection = [completions[i - first] for i in of_group]
            groups.append(_group(granule["group_id"][row].as_py(), prompt, selection))
            positions.append(of_group)
        first += len(completions)
    return groups, positions


def _group(group_id: bytes, prompt_ids: np.ndarray, completion_ids: Sequence[np.ndarray]) -> Group:
    return Group(group_id, prompt_ids, tuple(completion_ids), np.zeros(len(completion_ids), np.float32))


def _shared_tokens(group: Group) -> int:
    """Count the tokens that are saved because the prompt is computed once for all completions of the group."""
    return len(group.prompt_ids) * (len(group.completion_ids) - 1)


def _from_rank_0(value: Any) -> Any:
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gathered(values: list[bytes]) -> list[bytes]:
    """Concatenate the lists of all ranks; return the result on every rank. Each rank waits for all other ranks."""
    if not dist.is_initialized():
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]
