"""Score with vLLM: prompt log-probs of stored token ids, a prompt's KV cache shared between its completions."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_ray.errors import EngineError
from dpo_ray.reference.sampling import Sampling
from dpo_ray.reference.scorer import ScoreRequest, ScorerSettings

from .engine import adapter_request, can_load, start_engine, start_errors

logger = logging.getLogger(__name__)

ROUNDING = 1e-4  # a log-prob may be so much above 0
# Largest |difference| of a token's log-prob, in nats, with and without the cache. In float32 only the order of sums
# differs. bfloat16 itself is off by up to 0.2 on single tokens of a random text, whichever way it is computed, while a
# wrong cache is off by whole nats.
SHARING_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}


class VllmScorer:
    """One engine. Sequences of a group go in side by side, so that the later ones find the prompt in the cache."""

    share_prompt: bool  # whether the cache is read: asked for, and found right when the engine started
    adapter: Any | None  # what `engine.generate` takes as lora_request

    def __init__(self, settings: ScorerSettings, *, enable_sampling: bool = False) -> None:
        self._longest, self._loads = settings.max_length_tokens, 1
        self._started = self._settings = settings
        self._llm = start_engine(settings, enable_sampling=enable_sampling)
        self._by_token_ids = bool(self._llm.llm_engine.vllm_config.use_v2_model_runner)
        self.adapter = adapter_request(settings)
        self.cached_tokens = self.rescored = 0
        self.share_prompt = settings.share_prompt
        if self.share_prompt:
            with start_errors(settings):
                fault = self._sharing_fault(SHARING_TOLERANCE[settings.dtype])
            if fault is not None:
                self.share_prompt = False
                logger.warning("prompts are not shared between completions: %s (%s)", fault, settings.model_dir)
        self.cached_tokens = self.rescored = 0

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | None]:
        """Return float32 [completion tokens] for each request, in the order given; None where they are no log-probs.

        A cache hit is good only if it ends inside the prompt: what it covers of a completion has no log-prob (V2) or
        uninitialised memory (V1). Such sequences are scored again without reading the cache.

        Raises:
            EngineError: a sequence is not one that the engine was set up for, or tokens or values come back other than
                they must. What vLLM raises in the middle of its work goes through: the engine is then of no more use.
        """
        ids = [np.concatenate((r.prompt_ids, r.completion_ids)).tolist() for r in requests]
        for request, sequence in zip(requests, ids, strict=True):
            if not (len(request.prompt_ids) and len(request.completion_ids) and len(sequence) <= self._longest):
                raise EngineError(
                    f"cannot score {len(request.completion_ids)} tokens after a prompt of {len(request.prompt_ids)}",
                    fix=f"neither may be empty, and the engine was started for {self._longest} tokens in all",
                )
        scores: list[np.ndarray | None] = [None] * len(requests)
        pending = side_by_side(requests)
        for read_cache in (True, False) if self.share_prompt else (False,):
            answers = self._run([requests[i] for i in pending], [ids[i] for i in pending], read_cache=read_cache)
            for i, logps in zip(pending, answers, strict=True):
                scores[i] = logps
            pending = [i for i in pending if scores[i] is None]
            self.rescored += len(pending) if read_cache else 0
        return scores

    def load(self, settings: ScorerSettings) -> bool:
        """Take other weights, or another adapter, into the living engine; False where only a new engine can.

        Nothing of the prompts that were computed with the old ones is kept.

        Raises:
            EngineError: the weights are not of the model that the engine was started with.
        """
        if not can_load(self._started, self._settings, settings):
            return False
        if settings.model_dir != self._settings.model_dir:
            with start_errors(settings):
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": settings.model_dir})
                if settings.device == "cpu":
                    self._llm.collective_rpc(pack_head)
        self._loads += (
            1  # vLLM knows adapters by number and name: one that came back under an old one would be the old one
        )
        self.adapter = adapter_request(settings, self._loads)
        if self.adapter is not None:
            self._llm.llm_engine.add_lora(self.adapter)
        self._llm.reset_prefix_cache()
        self._settings = settings
        return True

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[tuple[list[int], bool]]]:
        """Return for each prompt, of each seed, the sampled token ids and whether they end with a stop token.

        It begins with an empty cache, so that what comes out is a function of what goes in.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self._llm.reset_prefix_cache()
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                max_tokens=sampling.max_new_tokens,
                detokenize=False,
                stop_token_ids=list(sampling.stop_token_ids),
                seed=seed,
            )
            for own in seeds
            for seed in own
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(p)) for p, own in zip(prompts, seeds, strict=True) for _ in own]
        outputs = iter(self._llm.generate(inputs, parameters, use_tqdm=False, lora_request=self.adapter))
        answers = ((next(outputs).outputs[0] for _ in own) for own in seeds)
        return [[(list(a.token_ids), a.finish_reason == "stop") for a in each] for each in answers]

    def close(self) -> None:
        """Stop the engine and its processes, and free its memory."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()

    def _run(
        self, requests: Sequence[ScoreRequest], ids: Sequence[list[int]], *, read_cache: bool
    ) -> list[np.ndarray | None]:
        """Score requests in their order; None for a hit in the cache that reaches too far, and for what is no log-probs.

        Args:
            ids: of each request, prompt and completion in one.
        """
        if not requests:
            return []
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        parameters: Any
        if self._by_token_ids:
            parameters = [SamplingParams(**token_id_parameters(r, read_cache)) for r in requests]
        else:
            parameters = SamplingParams(**flat_parameters(read_cache))
        prompts = [TokensPrompt(prompt_token_ids=sequence) for sequence in ids]
        answers = self._llm.generate(prompts, parameters, use_tqdm=False, lora_request=self.adapter)
        return [self._read(*each) for each in zip(requests, ids, answers, strict=True)]

    def _read(self, request: ScoreRequest, ids: list[int], answer: Any) -> np.ndarray | None:
        hit, tokens = answer.num_cached_tokens or 0, len(request.completion_ids)
        if hit >= len(request.prompt_ids):
            return None
        logps = read_token_ids(answer, ids, tokens) if self._by_token_ids else read_flat(answer, ids, tokens)
        if logps is None or not np.isfinite(logps).all() or logps.max() > ROUNDING:
            return None
        self.cached_tokens += hit
        return np.minimum(logps, 0.0)

    def _sharing_fault(self, tolerance: float) -> str | None:
        """Score one made-up group with and without the cache; say what is wrong with the cache, if anything is."""
        config = self._llm.llm_engine.vllm_config
        requests = probe_group(config.cache_config.block_size, self._longest, config.model_config.get_vocab_size())
        if not requests:
            return None  # no sequence is long enough for a block to be shared
        ids = [np.concatenate((r.prompt_ids, r.completion_ids)).tolist() for r in requests]
        with_cache = self._run(requests, ids, read_cache=True)
        hits = self.cached_tokens
        return sharing_fault(with_cache, self._run(requests, ids, read_cache=False), hits, tolerance)


def pack_head(worker: Any) -> None:
    """Pack the head's weight anew for the CPU's kernels, in vLLM's worker.

    vLLM does that when the head's weight is read. One that is the embedding's is never read itself, and would stay the old one.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def side_by_side(requests: Sequence[ScoreRequest]) -> list[int]:
    """Order requests: groups by their longest sequence, longest first, and the completions of a group together."""
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in requests]
    longest: dict[int, int] = {}
    for request, length in zip(requests, lengths, strict=True):
        longest[request.group] = max(length, longest.get(request.group, 0))
    return sorted(range(len(requests)), key=lambda i: (-longest[requests[i].group], requests[i].group, -lengths[i], i))


def probe_group(block_tokens: int, longest_tokens: int, vocabulary: int) -> list[ScoreRequest]:
    """Make up a prompt of some blocks with two completions that differ from their first token; none if it is too long."""
    tokens = min(8, longest_tokens // 4)
    prompt_tokens = min(3 * block_tokens + block_tokens // 2, longest_tokens - tokens)
    if tokens < 1 or prompt_tokens <= block_tokens:
        return []
    # The ends of a vocabulary are for special tokens, some of which stand for images.
    ids = np.random.default_rng(0).integers(
        vocabulary // 8, max(vocabulary // 2, vocabulary // 8 + 2), prompt_tokens + 2 * tokens, dtype=np.int32
    )
    prompt, first, second = np.split(ids, [prompt_tokens, prompt_tokens + tokens])
    if first[0] == second[0]:
        second[0] += 1
    return [ScoreRequest(0, prompt, completion) for completion in (first, second)]


def sharing_fault(
    with_cache: Sequence[np.ndarray | None], without_cache: Sequence[np.ndarray | None], hits: int, tolerance: float
) -> str | None:
    """Say what is wrong with scores of one group that were made with the cache; None where nothing is.

    Args:
        hits: tokens of the group that were read from the cache and not refused.
    """
    if any(logps is None for logps in without_cache):
        return "the model gives no log-probs for a random text"
    if any(logps is None for logps in with_cache):
        return "a hit in the cache reaches beyond the prompt, or gives no log-probs"
    if hits == 0:
        return "the engine does not find a prompt again in its cache"
    drift = max(float(np.abs(a - b).max()) for a, b in zip(with_cache, without_cache, strict=True))  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
    if drift > tolerance:
        return f"log-probs with and without the cache differ by {drift:.2g} nats, more than {tolerance:g}"
    return None


def flat_parameters(read_cache: bool) -> dict[str, Any]:
    """Ask for the log-probs of all tokens of a prompt: the only way of the V1 runner."""
    return {"prompt_logprobs": 0, "flat_logprobs": True, **_common_parameters(read_cache)}


def token_id_parameters(request: ScoreRequest, read_cache: bool) -> dict[str, Any]:
    """Ask for the log-probs of the completion's tokens alone: a way of the V2 runner, gathered on the GPU."""
    return {
        "prompt_logprob_token_ids": np.ascontiguousarray(request.completion_ids, np.int32)[:, None],
        "prompt_logprob_start": len(request.prompt_ids) - 1,  # the row that predicts the first of them
        **_common_parameters(read_cache),
    }


def _common_parameters(read_cache: bool) -> dict[str, Any]:
    return {"max_tokens": 1, "temperature": 0, "detokenize": False, "skip_reading_prefix_cache": not read_cache}


def read_flat(answer: Any, ids: list[int], tokens: int) -> np.ndarray:
    """Take the log-probs of the last `tokens` tokens out of an answer; float32 [tokens].

    Raises:
        EngineError: it is about other tokens.
    """
    flat = answer.prompt_logprobs
    if flat is None or flat.token_ids[-tokens:] != ids[-tokens:]:
        raise EngineError("vLLM scored other tokens than it was given", fix=_REPORT)
    return np.array(flat.logprobs[-tokens:], np.float32)


def read_token_ids(answer: Any, ids: list[int], tokens: int) -> np.ndarray | None:
    """Take the log-probs asked for by token id out of an answer; float32 [tokens], or None where the cache hid some.

    Raises:
        EngineError: they are not as many as were asked for.
    """
    logps = answer.prompt_token_id_logprobs
    if logps is None:
        return None
    if np.shape(logps) != (tokens, 1) or answer.prompt_token_ids != ids:
        raise EngineError("vLLM scored other tokens than it was given", fix=_REPORT)
    return np.asarray(logps, np.float32)[:, 0]


_REPORT = "set reference.engine=trainer, and report the model and the versions (`dpo-ray doctor`)"
