"""Score with vLLM: prompt log-probs of stored token ids, a prompt's KV cache shared between its completions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_ray.errors import EngineError

from .scorer import ScoreRequest, ScorerSettings

# Read by vLLM when it is imported. In process, uncompiled and unbound, an engine starts on CPU in seconds, not a minute.
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}


def start_engine(settings: ScorerSettings, *, enable_sampling: bool = False) -> Any:
    """Start a vLLM engine in this process.

    vLLM always samples one token after a prompt, so its context is one token longer than the longest sequence; that
    token's log-prob is never used.

    Raises:
        EngineError: it does not start; the reason is vLLM's.
    """
    os.environ.update(ENVIRONMENT | (CPU_ENVIRONMENT if settings.device == "cpu" else {}))
    from vllm import LLM

    options: dict[str, Any] = (
        {"kv_cache_memory_bytes": 512 << 20, "block_size": 32, "distributed_executor_backend": "uni"}
        if settings.device == "cpu"
        else {"gpu_memory_utilization": settings.gpu_memory_fraction}
    )
    try:
        return LLM(
            model=settings.model_dir,
            dtype=settings.dtype,
            max_model_len=settings.max_length_tokens + 1,
            max_num_batched_tokens=max(settings.max_batched_tokens, settings.max_length_tokens + 1),
            max_num_seqs=256,
            enable_prefix_caching=True,
            enforce_eager=settings.device == "cpu" or not enable_sampling,
            generation_config="vllm",
            skip_tokenizer_init=True,
            seed=0,
            disable_log_stats=True,
            trust_remote_code=False,
            **options,
        )
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise EngineError(
            f"vLLM does not start: {str(error).strip().splitlines()[-1]}",
            where=settings.model_dir,
            fix="see the engine's log above; `dpo-ray doctor` checks the installation, reference.engine=trainer does without vLLM",
        ) from error


class VllmScorer:
    """One engine. Sequences of a group go in side by side, so that the later ones find the prompt in the cache."""

    def __init__(self, settings: ScorerSettings, *, enable_sampling: bool = False) -> None:
        self._share_prompt = settings.share_prompt
        self._llm = start_engine(settings, enable_sampling=enable_sampling)
        self._by_token_ids = bool(getattr(self._llm.llm_engine.vllm_config, "use_v2_model_runner", False))
        self.cached_tokens = 0

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        """Return float32 [completion tokens] for each request, in the order given.

        A cache hit is good only if it ends inside the prompt: what it covers of a completion has no log-prob (V2) or
        uninitialised memory (V1). Such sequences are scored again without reading the cache.

        Raises:
            EngineError: tokens or values come back other than they must.
        """
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), requests[i].group, i))
        answers = self._run([requests[i] for i in order], read_cache=self._share_prompt)
        refused = [i for i, answer in zip(order, answers, strict=True) if answer is None]
        scores = dict(zip(order, answers, strict=True))
        scores.update(zip(refused, self._run([requests[i] for i in refused], read_cache=False), strict=True))
        valid: dict[int, np.ndarray] = {}
        for i, logps in scores.items():
            if (
                logps is None
                or len(logps) != len(requests[i].completion_ids)
                or not np.isfinite(logps).all()
                or (logps > 1e-4).any()
            ):
                raise EngineError(
                    "vLLM returned no valid log-probs for a sequence",
                    fix="set reference.engine=trainer, and report the model",
                )
            valid[i] = np.minimum(logps, 0.0)
        return [valid[i] for i in range(len(requests))]

    @property
    def engine(self) -> Any:
        """The vLLM engine, for who also samples from it."""
        return self._llm

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _run(self, requests: Sequence[ScoreRequest], *, read_cache: bool) -> list[np.ndarray | None]:
        if not requests:
            return []
        from vllm.inputs import TokensPrompt

        prompts = [
            TokensPrompt(prompt_token_ids=[*r.prompt_ids.tolist(), *r.completion_ids.tolist()]) for r in requests
        ]
        parameters = [self._parameters(r, read_cache) for r in requests]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [self._read(request, output) for request, output in zip(requests, outputs, strict=True)]

    def _parameters(self, request: ScoreRequest, read_cache: bool) -> Any:
        from vllm import SamplingParams

        common: dict[str, Any] = {
            "max_tokens": 1,
            "temperature": 0,
            "detokenize": False,
            "skip_reading_prefix_cache": not read_cache,
        }
        if self._by_token_ids:
            return SamplingParams(
                prompt_logprob_token_ids=request.completion_ids[:, None],
                prompt_logprob_start=len(request.prompt_ids) - 1,
                **common,
            )
        return SamplingParams(prompt_logprobs=0, flat_logprobs=True, **common)

    def _read(self, request: ScoreRequest, output: Any) -> np.ndarray | None:
        """Take the completion's log-probs out of an answer; None where the cache reached into the completion."""
        cached, tokens = output.num_cached_tokens or 0, len(request.completion_ids)
        if cached > len(request.prompt_ids) - 1:
            return None
        self.cached_tokens += cached
        if self._by_token_ids:
            ids = output.prompt_token_id_logprobs
            return None if ids is None else np.asarray(ids, np.float32)[:, 0]
        flat = output.prompt_logprobs
        if list(flat.token_ids[-tokens:]) != request.completion_ids.tolist():
            raise EngineError(
                "vLLM scored other tokens than it was given", fix="report the model and the versions (`dpo-ray doctor`)"
            )
        return np.asarray(flat.logprobs[-tokens:], np.float32)
