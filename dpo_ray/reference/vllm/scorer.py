"""Scoring with vLLM: it computes log-probs from token ids, and computes a prompt once for all its completions."""

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

ROUNDING = 1e-4  # rounding may put a log-prob above 0 by at most this much
# Largest allowed |difference| of a token's log-prob, in nats, with and without the cache. In float32 only the order of
# summation differs. In bfloat16, rounding alone causes errors up to 0.2 on single tokens of a random text. But a wrong
# cache causes errors of 1 nat and more.
SHARING_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}


class VllmScorer:
    """A scorer with one vLLM engine.

    The completions of one prompt are scored directly after each other. So vLLM computes the prompt only for the first
    one, and finds it in the prefix cache for the others.
    """

    share_prompt: bool  # whether the prefix cache is used: True if the settings say so and a check at the start passed
    adapter: Any | None  # the `lora_request` for `generate`

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
                logger.warning("the prompt cache is not used for completions: %s (%s)", fault, settings.model_dir)
        self.cached_tokens = self.rescored = 0

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray | None]:
        """Return the log-probs of the completion of each request, in the same order: float32 [completion tokens].

        The result of a request is None if vLLM returned values that cannot be log-probs.

        A hit in the prefix cache is valid only if it ends inside the prompt. If a hit reaches into the completion, the
        values for the cached tokens are missing (V2 runner) or are uninitialised memory (V1 runner). Such sequences are
        scored again without reading the cache.

        Raises:
            EngineError: a prompt or completion is empty, both together are longer than the engine's limit, or vLLM's
                result has other tokens or another shape. Other exceptions from vLLM are not caught; after such
                an exception the engine is unusable.
        """
        ids = [np.concatenate((r.prompt_ids, r.completion_ids)).tolist() for r in requests]
        for request, sequence in zip(requests, ids, strict=True):
            if not (len(request.prompt_ids) and len(request.completion_ids) and len(sequence) <= self._longest):
                raise EngineError(
                    f"cannot score {len(request.completion_ids)} tokens after a prompt of {len(request.prompt_ids)} tokens",
                    fix=f"neither may be empty, and both together may have at most {self._longest} tokens",
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
        """Load other weights or another adapter into the running engine; return False if this needs a new engine.

        The prefix cache is cleared, because it was computed with the old weights.

        Raises:
            EngineError: the weights do not fit the model with which the engine was started.
        """
        if not can_load(self._started, self._settings, settings):
            return False
        if settings.model_dir != self._settings.model_dir:
            with start_errors(settings):
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": settings.model_dir})
                if settings.device == "cpu":
                    self._llm.collective_rpc(pack_head)
        self._loads += 1  # vLLM identifies adapters by number and name: with an old number it would use the old adapter
        self.adapter = adapter_request(settings, self._loads)
        if self.adapter is not None:
            self._llm.llm_engine.add_lora(self.adapter)
        self._llm.reset_prefix_cache()
        self._settings = settings
        return True

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[tuple[list[int], bool]]]:
        """Sample one completion for each seed of each prompt.

        Return the token ids of each completion, and whether it ends with a stop token. The prefix cache is cleared
        first, so that the result depends only on the arguments.
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
        """Score requests, and return the log-probs of each request in order.

        The result of a request is None if a cache hit reached the completion, or if the values cannot be log-probs.

        Args:
            ids: for each request, the token ids of its prompt and completion together.
            read_cache: whether vLLM may read the prefix cache.
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
        """Check the prefix cache: score one artificial group with and without the cache, and compare the log-probs.

        Return what is wrong with the cache, or None.
        """
        config = self._llm.llm_engine.vllm_config
        requests = probe_group(config.cache_config.block_size, self._longest, config.model_config.get_vocab_size())
        if not requests:
            return None  # sequences are too short to share a block
        ids = [np.concatenate((r.prompt_ids, r.completion_ids)).tolist() for r in requests]
        with_cache = self._run(requests, ids, read_cache=True)
        hits = self.cached_tokens
        return sharing_fault(with_cache, self._run(requests, ids, read_cache=False), hits, tolerance)


def pack_head(worker: Any) -> None:
    """Convert the weight of the output head again to the layout of the CPU kernels. This runs in vLLM's worker.

    vLLM converts the weight when it loads the head. But a head that is tied to the embedding is never loaded, so vLLM
    would continue to use the old converted weight.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def side_by_side(requests: Sequence[ScoreRequest]) -> list[int]:
    """Return the indices of the requests in the order of scoring: group by group, groups with long sequences first."""
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in requests]
    longest: dict[int, int] = {}
    for request, length in zip(requests, lengths, strict=True):
        longest[request.group] = max(length, longest.get(request.group, 0))
    return sorted(range(len(requests)), key=lambda i: (-longest[requests[i].group], requests[i].group, -lengths[i], i))


def probe_group(block_tokens: int, longest_tokens: int, vocabulary: int) -> list[ScoreRequest]:
    """Build two requests to test the prefix cache: one prompt, and two completions that differ in the first token.

    The prompt fills a few blocks of the cache. Return [] if such a prompt is too long for the engine.
    """
    tokens = min(8, longest_tokens // 4)
    prompt_tokens = min(3 * block_tokens + block_tokens // 2, longest_tokens - tokens)
    if tokens < 1 or prompt_tokens <= block_tokens:
        return []
    # Both ends of a vocabulary often contain special tokens, some of which represent images.
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
    """Compare a group's log-probs with and without the cache; return what is wrong with the cache, or None.

    Args:
        hits: number of tokens that were read from the cache.
        tolerance: largest allowed difference of two log-probs, in nats.
    """
    if any(logps is None for logps in without_cache):
        return "the model gives no log-probs for a random text"
    if any(logps is None for logps in with_cache):
        return "a cache hit reaches beyond the prompt, or gives no log-probs"
    if hits == 0:
        return "the engine does not find a prompt in its cache"
    drift = max(float(np.abs(a - b).max()) for a, b in zip(with_cache, without_cache, strict=True))  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
    if drift > tolerance:
        return f"log-probs with and without the cache differ by {drift:.2g} nats; the limit is {tolerance:g}"
    return None


def flat_parameters(read_cache: bool) -> dict[str, Any]:
    """Build vLLM's parameters for the V1 runner, which can only return the log-probs of all tokens of a sequence."""
    return {"prompt_logprobs": 0, "flat_logprobs": True, **_common_parameters(read_cache)}


def token_id_parameters(request: ScoreRequest, read_cache: bool) -> dict[str, Any]:
    """Build vLLM's parameters for the V2 runner, which can return only the log-probs of the completion's tokens."""
    return {
        "prompt_logprob_token_ids": np.ascontiguousarray(request.completion_ids, np.int32)[:, None],
        "prompt_logprob_start": len(request.prompt_ids) - 1,  # the row that predicts the completion's first token
        **_common_parameters(read_cache),
    }


def _common_parameters(read_cache: bool) -> dict[str, Any]:
    return {"max_tokens": 1, "temperature": 0, "detokenize": False, "skip_reading_prefix_cache": not read_cache}


def read_flat(answer: Any, ids: list[int], tokens: int) -> np.ndarray:
    """Read the log-probs of the last `tokens` tokens from a result of vLLM's V1 runner: float32 [tokens].

    Raises:
        EngineError: the result belongs to other tokens.
    """
    flat = answer.prompt_logprobs
    if flat is None or flat.token_ids[-tokens:] != ids[-tokens:]:
        raise EngineError("vLLM scored other tokens than those in the request", fix=_REPORT)
    return np.array(flat.logprobs[-tokens:], np.float32)


def read_token_ids(answer: Any, ids: list[int], tokens: int) -> np.ndarray | None:
    """Read the log-probs of a completion from a result of vLLM's V2 runner: float32 [tokens].

    Return None if the result has no log-probs, because a cache hit covers some of the completion's tokens.

    Raises:
        EngineError: the result belongs to other tokens, or has another number of log-probs.
    """
    logps = answer.prompt_token_id_logprobs
    if logps is None:
        return None
    if np.shape(logps) != (tokens, 1) or answer.prompt_token_ids != ids:
        raise EngineError("vLLM scored other tokens than those in the request", fix=_REPORT)
    return np.asarray(logps, np.float32)[:, 0]


_REPORT = "set reference.engine=trainer, and report the model and the versions (`dpo-ray doctor`)"
