"""The engine, the trainer and a plain Hugging Face forward give every token the same log-prob, family by family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dpo_ray.data.groups import Group
from dpo_ray.models.load import load_policy
from dpo_ray.models.packed_rows import PackedRows, packed_rows
from dpo_ray.models.token_logps import TokenLogps
from dpo_ray.reference.scorer import ScoreRequest, ScorerSettings
from dpo_ray.reference.trainer_scorer import TrainerScorer
from dpo_ray.schedule.micro_batch import pack
from tests.helpers.families import SERVED, plain_model, plain_token_logps, write_family

TOLERANCE_NATS = 1e-4  # of a token, in float32
FAMILIES = [
    "llama",
    pytest.param("gemma2", marks=pytest.mark.slow),
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in ("mistral", "phi", "llama3", "qwen2", "qwen3", "gemma", "gemma3", "phi3", "phi4")
    ),
    *(pytest.param(name, marks=pytest.mark.long) for name in ("granite", "cohere")),
]
BLOCK_TOKENS = 32  # of the engine's cache on CPU: what it shares are whole blocks
Scores = list[np.ndarray]


@dataclass(frozen=True)
class EngineAnswer:
    """What one engine said: the scores of two calls with the same sequences, and what it counted."""

    first: Scores
    second: Scores
    cached_tokens: int
    rescored: int


def ask_engine(settings: ScorerSettings, requests: Sequence[ScoreRequest]) -> EngineAnswer:
    """Start an engine in this process, score twice (then the cache knows everything), the second time backwards; stop it."""
    from dpo_ray.reference.vllm.scorer import VllmScorer

    scorer = VllmScorer(settings)
    try:
        first = scorer.score(requests)
        second = scorer.score(requests[::-1])[::-1]
        assert all(logps is not None for logps in (*first, *second))
        return EngineAnswer(first, second, scorer.cached_tokens, scorer.rescored)
    finally:
        scorer.close()


@pytest.fixture(scope="module")
def engine_process() -> Iterator[ProcessPoolExecutor]:
    """Keep a process for engines, one after the other: they set global state, and importing vLLM takes most of the time."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        patch.setenv("OMP_NUM_THREADS", "1")  # more threads wait for one another longer than these models compute
        yield process


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def directory(name: str) -> Path:
        return write_family(name, tmp_path_factory.mktemp(name), SERVED)

    return directory


def parity_groups() -> list[Group]:
    """Return groups on and around all the edges: of the cache's blocks, of prompts, of windows, of the context."""
    rng = np.random.default_rng(7)

    def ids(tokens: int) -> np.ndarray:
        return rng.integers(3, SERVED.vocabulary, tokens, dtype=np.int32)

    def group(prompt: int, completions: Sequence[np.ndarray]) -> Group:
        return Group(b"", ids(prompt), tuple(completions), np.zeros(len(completions), np.float32))

    same = ids(BLOCK_TOKENS + 13)
    twins = ids(40)
    ordinary = group(2 * BLOCK_TOKENS + 6, [ids(17), ids(33)])
    return [
        ordinary,
        ordinary,  # the same group again
        replace(ordinary, completion_ids=ordinary.completion_ids[::-1]),
        group(BLOCK_TOKENS + 8, [np.concatenate([same, ids(15)]), np.concatenate([same, ids(9)]), same, ids(30)]),
        group(50, [twins, twins.copy()]),  # the same completion twice
        group(2 * BLOCK_TOKENS, [ids(8), ids(9)]),  # the last block of the prompt holds the first predictor
        group(2 * BLOCK_TOKENS + 1, [ids(8), ids(9)]),
        group(70, [ids(1), ids(1), ids(5), ids(1)]),
        group(1, [ids(1), ids(40)]),
        group(65, [ids(SERVED.context - 65), ids(SERVED.context - 65), ids(3)]),  # fills the context exactly
        group(SERVED.context - 1, [ids(1), ids(1)]),
    ]


def requests_of(groups: Sequence[Group]) -> list[ScoreRequest]:
    return [ScoreRequest(g, group.prompt_ids, c) for g, group in enumerate(groups) for c in group.completion_ids]


def settings_of(directory: Path, **changes: Any) -> ScorerSettings:
    values: dict[str, Any] = {
        "engine": "vllm",
        "model_dir": str(directory),
        "dtype": "float32",
        "device": "cpu",
        "max_length_tokens": SERVED.context,
        "max_batched_tokens": None,
        "gpu_memory_fraction": 0.85,
        "share_prompt": True,
    }
    return ScorerSettings(**values | changes)


def plain_scores(model: Any, groups: Sequence[Group]) -> Scores:
    """Score every sequence in a forward pass of its own, as transformers alone does."""
    with torch.no_grad():
        flat = plain_token_logps(model, list(groups)).numpy()
    lengths = [len(c) for group in groups for c in group.completion_ids]
    return np.split(flat, np.cumsum(lengths)[:-1])


def trainer_scores(directory: Path, requests: Sequence[ScoreRequest], **changes: Any) -> Scores:
    scorer = TrainerScorer(settings_of(directory, engine="trainer", **{"max_batched_tokens": 600} | changes))
    try:
        return scorer.score(requests)
    finally:
        scorer.close()


def largest_difference(actual: Scores, expected: Scores) -> float:
    return float(np.abs(np.concatenate(actual) - np.concatenate(expected)).max())


def assert_same(actual: Scores, expected: Scores) -> None:
    assert [len(a) for a in actual] == [len(e) for e in expected]
    assert all(a.dtype == np.float32 for a in actual)
    np.testing.assert_allclose(np.concatenate(actual), np.concatenate(expected), rtol=0, atol=TOLERANCE_NATS)


def assert_varied(scores: Scores) -> None:
    """Check that these are not the log-probs of a flat distribution, which a wrong model could have as well."""
    flat = np.concatenate(scores)
    assert flat.std() > 0.3
    assert flat.max() - flat.min() > 2.0


@pytest.mark.parametrize("name", FAMILIES)
def test_engine_trainer_and_plain_forward_agree(
    name: str, family: Callable[[str], Path], engine_process: ProcessPoolExecutor
) -> None:
    directory, groups = family(name), parity_groups()
    requests = requests_of(groups)
    asked = {"sharing": settings_of(directory), "not sharing": settings_of(directory, share_prompt=False)}
    if name in ("llama", "gemma2"):  # steps shorter than a sequence: prompts and completions are computed by chunks
        asked["sharing, by chunks"] = settings_of(directory, max_batched_tokens=100)
    answers = {how: engine_process.submit(ask_engine, settings, requests) for how, settings in asked.items()}

    plain = plain_scores(plain_model(directory), groups)
    assert_varied(plain)
    assert_same(trainer_scores(directory, requests), plain)
    alone = [replace(request, group=i) for i, request in enumerate(requests)]  # no two in a group: nothing is shared
    assert_same(trainer_scores(directory, alone), plain)

    for how, answer in ((how, future.result()) for how, future in answers.items()):
        assert_same(answer.first, plain)
        assert_same(answer.second, plain)
        if how == "not sharing":
            assert answer.cached_tokens == answer.rescored == 0
        else:
            assert answer.cached_tokens >= 4 * BLOCK_TOKENS
            # In the second call all that is long enough was in the cache to its end.
            assert answer.rescored >= len(requests) // 2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llama", marks=pytest.mark.slow),
        *(pytest.param(n, marks=pytest.mark.long) for n in ("qwen3", "mistral", "gemma2", "phi", "phi3")),
    ],
)
def test_with_an_adapter_they_agree_too(
    name: str, family: Callable[[str], Path], tmp_path: Path, engine_process: ProcessPoolExecutor
) -> None:
    """PEFT runs the adapter beside the frozen weights, vLLM in kernels of its own; the trainer adds it to the weights."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(plain_model(family(name)), config).save_pretrained(tmp_path)
    groups = parity_groups()
    requests = requests_of(groups)
    answer = engine_process.submit(ask_engine, settings_of(family(name), adapter_dir=str(tmp_path)), requests)

    base = plain_scores(plain_model(family(name)), groups)
    adapted = plain_scores(PeftModel.from_pretrained(plain_model(family(name)), tmp_path).eval(), groups)
    assert largest_difference(adapted, base) > 1.0  # or leaving it out would not be seen
    assert_same(trainer_scores(family(name), requests, adapter_dir=str(tmp_path)), adapted)
    assert_same(answer.result().first, adapted)
    assert_same(answer.result().second, adapted)


@pytest.mark.parametrize("shards", ["one file", "many files"])
def test_the_engine_reads_the_files_that_the_trainer_reads(
    shards: str, family: Callable[[str], Path], tmp_path: Path, engine_process: ProcessPoolExecutor
) -> None:
    """Mistral's models come with the weights in its own format beside; here these are others, to see which are read."""
    model = plain_model(family("mistral"))
    model.save_pretrained(tmp_path, max_shard_size="5GB" if shards == "one file" else "300KB")
    weights = load_file(family("mistral") / "model.safetensors")
    save_file({name: 1.1 * w for name, w in weights.items()}, tmp_path / "consolidated.safetensors")
    groups = parity_groups()[:3]
    answer = engine_process.submit(ask_engine, settings_of(tmp_path), requests_of(groups))
    assert_same(answer.result().first, plain_scores(model, groups))


def widen_window(policy: TokenLogps) -> None:
    policy.model.config.sliding_window += 1
    for module in policy.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window += 1


def drop_softcap_of_logits(policy: TokenLogps) -> None:
    policy.logit_softcap = None


def drop_softcap_of_attention(policy: TokenLogps) -> None:
    for layer in policy.model.get_decoder().layers:
        layer.self_attn.attn_logit_softcapping = None


def drop_norm_of_queries(policy: TokenLogps) -> None:
    for layer in policy.model.get_decoder().layers:
        layer.self_attn.q_norm = nn.Identity()


def exchange_key_heads(policy: TokenLogps) -> None:
    for layer in policy.model.get_decoder().layers:
        layer.self_attn.k_proj.weight.data = layer.self_attn.k_proj.weight.data.roll(SERVED.head_dim, dims=0)


def drop_bias_of_head(policy: TokenLogps) -> None:
    policy.model.get_output_embeddings().bias.data.zero_()


def drop_scale_of_logits(policy: TokenLogps) -> None:
    policy.logit_scale = 1.0


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("llama", exchange_key_heads),
        ("qwen3", drop_norm_of_queries),
        ("mistral", widen_window),
        ("phi3", widen_window),
        ("gemma2", widen_window),
        ("gemma2", drop_softcap_of_logits),
        ("gemma2", drop_softcap_of_attention),
        ("phi", drop_bias_of_head),
        ("granite", drop_scale_of_logits),
    ],
)
def test_a_wrong_model_would_be_seen(
    name: str, damage: Callable[[TokenLogps], None], family: Callable[[str], Path]
) -> None:
    groups = parity_groups()
    policy, rows = load_policy(family(name), torch.float32, 1024).eval(), packed_rows(pack(groups))
    expected = plain_scores(plain_model(family(name)), groups)
    with torch.no_grad():
        assert largest_difference([policy(rows).logps.numpy()], expected) < TOLERANCE_NATS
        damage(policy)
        assert largest_difference([policy(rows).logps.numpy()], expected) > 1000 * TOLERANCE_NATS


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: replace(rows, predictor=rows.predictor + 1),
        lambda rows: replace(rows, target=rows.target.roll(1)),
        lambda rows: replace(rows, position_ids=torch.arange(rows.tokens)[None]),
        lambda rows: replace(rows, segments=tuple(replace(s, prompt_stop=s.prompt_start) for s in rows.segments)),
    ],
    ids=["predicted by itself", "another token's log-prob", "positions do not begin anew", "no prompt"],
)
def test_a_wrong_layout_would_be_seen(
    change: Callable[[PackedRows], PackedRows], family: Callable[[str], Path]
) -> None:
    groups = parity_groups()
    policy, rows = load_policy(family("llama"), torch.float32, 1024).eval(), packed_rows(pack(groups))
    expected = plain_scores(plain_model(family("llama")), groups)
    with torch.no_grad():
        assert largest_difference([policy(change(rows)).logps.numpy()], expected) > 1000 * TOLERANCE_NATS
