"""A real vLLM engine on CPU: its scores are those of a plain forward pass, whatever its cache holds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpo_ray.errors import ConfigError, EngineError
from dpo_ray.reference.scorer import ScoreRequest, ScorerSettings
from tests.helpers.processes.vllm_engine import EngineProcess, engine_processes

pytestmark = (
    pytest.mark.slow
)  # each engine takes some ten seconds; one is in make test: tests/integration/test_parity.py
CONTEXT = 128  # tokens that the model is made for
BLOCK = 32  # tokens of a block of the KV cache on CPU
STEP = 96  # tokens of an engine step: less than the longest sequence, which is therefore computed by chunks
BROKEN_TOKEN = 299  # has an embedding that is not a number
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a random model with grouped queries and a context of 128; whatever sees the last token gives no numbers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data[BROKEN_TOKEN] = torch.nan
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def settings(model_dir: Path) -> ScorerSettings:
    return ScorerSettings("vllm", str(model_dir), "float32", "cpu", CONTEXT, STEP, 0.5, share_prompt=True)


@pytest.fixture(scope="module")
def process() -> Iterator[EngineProcess]:
    process = EngineProcess()
    yield process
    process.end()


@pytest.fixture(scope="module")
def engine(process: EngineProcess, settings: ScorerSettings) -> EngineProcess:
    process.start(settings)
    return process


@pytest.fixture(scope="module")
def model(model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def adapted(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """Save a random adapter whose matrices have different ranks and scales; give also the model that wears it."""
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        rank_pattern={"down_proj": 12},
        alpha_pattern={"o_proj": 3},
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    model = get_peft_model(base, config).eval()
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(directory)
    return directory, model


@torch.no_grad()
def plain(model: torch.nn.Module, requests: list[ScoreRequest]) -> list[np.ndarray]:
    """Score each sequence by itself."""
    results = []
    for r in requests:
        ids = torch.tensor(np.concatenate([r.prompt_ids, r.completion_ids]), dtype=torch.int64)[None]
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        results.append(logps[len(r.prompt_ids) - 1 :].numpy())
    return results


def ids(tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, BROKEN_TOKEN, tokens, dtype=np.int32)


def group(number: int, prompt_tokens: int, *completion_tokens: int) -> list[ScoreRequest]:
    """Make a random group; `number` is its seed as well."""
    prompt = ids(prompt_tokens, 1000 * number)
    return [ScoreRequest(number, prompt, ids(n, 1000 * number + k + 1)) for k, n in enumerate(completion_tokens)]


def check(actual: list[np.ndarray | None], expected: list[np.ndarray]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a is not None
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_prompts_are_computed_once_and_scores_are_those_of_a_plain_forward(engine, model) -> None:
    """Groups of many shapes, interleaved, in one call; the second completion of a group finds its prompt's blocks."""
    groups = [
        group(1, 70, 20, 30),
        group(2, 10, 5, 5),  # shorter than a block: nothing to share
        group(
            3, 64, 1, 1
        ),  # one token each; the prompt ends with a block, whose last token predicts the completion's first
        group(4, 33, 40, 2, 1, 95),  # fills the context
        group(5, 1, 3, 2),
        group(6, 127, 1, 1),  # fills it twice, by one token
    ]
    requests = [r for _, r in sorted(enumerate(r for g in groups for r in g), key=lambda each: each[0] % 3)]
    answer = engine.score(requests)
    check(answer.scores, plain(model, requests))
    assert answer.rescored == 1  # in group 3
    assert answer.cached_tokens == 2 * BLOCK + 3 * BLOCK + 3 * BLOCK  # in groups 1, 4 and 6
    assert engine.shares_prompts()


def test_a_completion_that_starts_like_another_is_scored_again_without_the_cache(engine, model) -> None:
    first = group(11, 40, 60)[0]
    like = replace(first, completion_ids=np.concatenate([first.completion_ids[:50], ids(8, 5)]))
    a_little_like = replace(first, completion_ids=np.concatenate([first.completion_ids[:10], ids(8, 6)]))
    requests = [first, like, a_little_like]
    answer = engine.score(requests)
    check(answer.scores, plain(model, requests))
    assert answer.rescored == 1  # of `like`, the second block is its prompt's end and its own start
    assert answer.cached_tokens == BLOCK


def test_duplicates(engine, model) -> None:
    requests = group(12, 50, 40) * 3 + group(13, 40, 4) * 2
    answer = engine.score(requests)
    check(answer.scores, plain(model, requests))
    assert answer.rescored == 2
    again = engine.score(requests)  # all are in the cache now
    check(again.scores, plain(model, requests))
    assert again.rescored == 3


def test_a_sequence_without_log_probs_harms_no_other(engine, model) -> None:
    """Its group, those computed in the same step, and those that get its blocks of the cache afterwards."""
    good, bad = group(14, 40, 30, 30)
    bad = replace(bad, completion_ids=np.append(bad.completion_ids, [BROKEN_TOKEN, 7]).astype(np.int32))
    bad_prompt = replace(group(15, 40, 5)[0], prompt_ids=np.full(40, BROKEN_TOKEN, np.int32))
    requests = [good, bad, bad_prompt, *group(16, 5, 6, 7)]
    scores = engine.score(requests).scores
    assert scores[1] is None
    assert scores[2] is None
    kept = [0, 3, 4]
    check([scores[i] for i in kept], plain(model, [requests[i] for i in kept]))
    later = [r for n in range(100, 140) for r in group(n, 60, 50, 20)]
    check(engine.score(later).scores, plain(model, later))


def test_one_request_and_none(engine, model) -> None:
    assert engine.score([]).scores == []
    one = group(17, 20, 6)[:1]
    check(engine.score(one).scores, plain(model, one))


def test_a_sequence_that_the_engine_was_not_set_up_for_is_refused_before_any_is_scored(engine) -> None:
    for wrong in (group(18, 100, 29), group(19, 0, 5), group(20, 5, 0)):
        with pytest.raises(EngineError, match="cannot score"):
            engine.score([*group(18, 20, 5), *wrong])


def test_without_sharing_nothing_is_read_from_the_cache(process, settings, model) -> None:
    """Also: an engine can follow another in one process, and chooses the tokens of a step by itself."""
    process.start(replace(settings, share_prompt=False, max_batched_tokens=None))
    requests = group(1, 70, 20, 30) * 2
    answer = process.score(requests)
    check(answer.scores, plain(model, requests))
    assert (answer.cached_tokens, answer.rescored) == (0, 0)
    assert not process.shares_prompts()


def test_an_engine_whose_cache_is_found_wrong_goes_on_without_it(process, settings, model) -> None:
    process.start(settings, sharing_tolerance=-1)  # then no difference at all is too much
    assert not process.shares_prompts()
    requests = group(1, 70, 20, 30)
    answer = process.score(requests)
    check(answer.scores, plain(model, requests))
    assert (answer.cached_tokens, answer.rescored) == (0, 0)


def test_an_adapter_is_applied(process, settings, adapted, model) -> None:
    directory, adapted_model = adapted
    process.start(replace(settings, adapter_dir=str(directory)))
    requests = group(1, 70, 20, 30)
    answer = process.score(requests)
    expected = plain(adapted_model, requests)
    check(answer.scores, expected)
    assert answer.cached_tokens == 2 * BLOCK
    assert np.abs(expected[0] - plain(model, requests)[0]).max() > 0.1


def test_an_engine_that_cannot_start_says_why(process, settings, model_dir, tmp_path) -> None:
    with pytest.raises(EngineError, match=r"vLLM does not start: .*Unrecognized model"):
        process.start(replace(settings, model_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"adapter_config\.json cannot be read"):
        process.start(replace(settings, adapter_dir=str(model_dir)))


@pytest.mark.long
def test_two_processes_that_share_the_model_give_the_same_and_end_with_the_engine(process, settings, model) -> None:
    """Also where the engine's own process is killed."""
    process.start(replace(settings, tensor_parallel=2))
    requests = group(1, 70, 20, 30) + group(3, 64, 1, 1) + group(4, 33, 95)
    answer = process.score(requests)
    check(answer.scores, plain(model, requests))
    assert answer.cached_tokens == 2 * BLOCK
    pid = process.pid()
    assert len(engine_processes(pid)) == 2
    process.close()
    assert engine_processes(pid) == []
    process.start(replace(settings, tensor_parallel=2))
    orphans = engine_processes(pid)
    assert len(orphans) == 2
    os.kill(pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert alive == []
