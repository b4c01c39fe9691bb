"""Start of a vLLM engine. Its options are derived from the model, the device and the longest sequence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dpo_ray.errors import ConfigError, DpoRayError, EngineError
from dpo_ray.reference.native_libraries import how_to_fix, library_faults, what_is_wrong
from dpo_ray.reference.scorer import ScorerSettings

if TYPE_CHECKING:
    from dpo_ray.models.adapter import Adapter

# vLLM reads these when it is imported. They keep the engine's core in the actor's own process. So its schedule depends
# only on the requests, and it ends together with the actor.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
# Without compilation and without binding threads to cores, an engine starts on CPU in seconds instead of a minute.
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}

MAX_SEQUENCES = 256  # in one step
CPU_BLOCK_TOKENS = 32  # vLLM's CPU kernels require multiples of 32
MIN_STEP_TOKENS = 256
V2_LOGITS_ROWS = 1024  # the V2 runner computes prompt logits in chunks of this number of rows
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # maximum ranks that vLLM supports
OUTSIDE_LAYERS = ("lm_head", "embed", "wte", "wpe")  # embed_tokens, embed_in, embed_out, ...


@dataclass(frozen=True)
class EngineFacts:
    """Facts about the model and the device from vLLM, which determine the step size and the KV cache size."""

    vocabulary: int
    value_bytes: int  # size of one logit, and of one number in the KV cache
    kv_values_per_token: int  # on one device
    v2_runner: bool
    tensor_parallel: int
    device_bytes: int  # all memory of one GPU, or of the machine


def start_engine(settings: ScorerSettings, *, enable_sampling: bool = False) -> Any:
    """Start a vLLM engine in this process, and load the LoRA adapter if there is one.

    vLLM always samples one token after a prompt. So the engine's context is one token longer than the longest sequence.
    The sampled token is never used.

    Raises:
        ConfigError: vLLM cannot score correctly with this adapter.
        EngineError: the engine does not start; the error contains vLLM's reason.
    """
    options = _options(settings, enable_sampling)
    os.environ.update(ENVIRONMENT | (CPU_ENVIRONMENT if settings.device == "cpu" else {}))
    # Failures are raised as exceptions; vLLM's warnings concern options set here on purpose, some at every request.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with start_errors(settings):
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs

        llm = LLM(**options, **_sizes(settings, EngineArgs(**options).create_engine_config()))
        if (adapter := adapter_request(settings)) is not None:
            llm.llm_engine.add_lora(adapter)
    return llm


@contextmanager
def start_errors(settings: ScorerSettings) -> Iterator[None]:
    """Convert any exception that vLLM raises inside the `with` block, in which it starts, to an EngineError.

    If this machine cannot load a native library of vLLM, the error names that library, because vLLM's exception does not.
    """
    try:
        yield
    except DpoRayError:
        raise
    except Exception as error:
        text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        what = f"vLLM does not start: {(text.strip() or repr(error)).splitlines()[0]}"
        fix = "see the engine's log above; `dpo-ray doctor` checks the installation; reference.engine=trainer needs no vLLM"
        if faults := library_faults():
            what, fix = f"vLLM does not start: {what_is_wrong(faults)}", how_to_fix(faults)
        raise EngineError(what, where=settings.model_dir, fix=fix) from error


def adapter_request(settings: ScorerSettings, number: int = 1) -> Any | None:
    """Build the object (LoRARequest) with which vLLM's `generate` uses the LoRA adapter; None if there is no adapter.

    Args:
        number: a new number for each adapter that the engine loads, because vLLM's caches identify adapters by number.
    """
    if settings.adapter_dir is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter-{number}", number, settings.adapter_dir)


def can_load(started: ScorerSettings, now: ScorerSettings, wanted: ScorerSettings) -> bool:
    """Return whether an engine can load the model of `wanted` without a restart.

    An engine that was started without an adapter cannot load an adapter. An engine that was started with an adapter
    cannot load another base model.

    Args:
        started: the settings with which the engine was started.
        now: the settings of the model that the engine has loaded now.
        wanted: the settings of the model to load.
    """
    if replace(started, model_dir="", adapter_dir=None) != replace(wanted, model_dir="", adapter_dir=None):
        return False
    if started.adapter_dir is None:
        return wanted.adapter_dir is None
    if wanted.model_dir != now.model_dir:
        return False
    return wanted.adapter_dir is None or _room(started.adapter_dir) == _room(wanted.adapter_dir)


def _room(adapter_dir: str) -> dict[str, Any]:
    from dpo_ray.models.adapter import read_adapter  # it imports torch, which who only asks for sizes does not need

    return lora_options(read_adapter(Path(adapter_dir)))


def _options(settings: ScorerSettings, enable_sampling: bool) -> dict[str, Any]:
    """Build the options of the engine, except for its sizes (`_sizes`)."""
    options: dict[str, Any] = {
        "model": settings.model_dir,
        # The same files that the trainer reads: by default vLLM prefers Mistral's own format if a directory has both.
        "config_format": "hf",
        "load_format": "safetensors",
        "dtype": settings.dtype,
        "max_model_len": settings.max_length_tokens + 1,
        "tensor_parallel_size": settings.tensor_parallel,
        # With "ray", each shard would be an actor in a placement group of single GPUs, and the engine's own actor would
        # have no GPU. It is simpler if one actor owns all GPUs of the engine, with one process for each GPU. These
        # processes end with the actor, because each waits on a pipe to it. But an engine must then fit on one node.
        "distributed_executor_backend": "uni" if settings.tensor_parallel == 1 else "mp",
        "enable_prefix_caching": True,
        "enforce_eager": settings.device == "cpu" or not enable_sampling,
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "seed": 0,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
    }
    if settings.device == "cpu":
        options["block_size"] = CPU_BLOCK_TOKENS
        # If a prompt is computed in two steps, vLLM rewinds the request's own random generator after the first step,
        # and torch's CPU generators cannot be rewound: the engine would die.
        options["enable_chunked_prefill"] = not enable_sampling
    else:
        options["gpu_memory_utilization"] = settings.gpu_memory_fraction
    if settings.adapter_dir is not None:
        options |= _room(settings.adapter_dir)
    return options


def lora_options(adapter: Adapter) -> dict[str, Any]:
    """Build the options that prepare an engine for one LoRA adapter.

    Only the modules that the adapter changes are prepared. By default vLLM would also prepare the output head. The
    log-probs of prompts would then be wrong even if the adapter does not change the head, because vLLM's head treats
    each row of a prompt as a separate sequence.

    Raises:
        ConfigError: the adapter changes the output head or the embeddings, or its rank is above vLLM's limit.
    """
    modules = sorted({name.rsplit(".", 1)[-1] for name in adapter.layers})
    fix = "use reference.engine=trainer, or merge the adapter into the model"
    if outside := [m for m in modules if any(name in m for name in OUTSIDE_LAYERS)]:
        what = f"the adapter changes {', '.join(outside)}, which vLLM leaves out of the log-probs of prompts"
        raise ConfigError(what, where=adapter.where, fix=fix)
    rank = max(layer.rank for layer in adapter.layers.values())
    if rank > LORA_RANKS[-1]:
        what = f"the adapter's rank {rank} is above vLLM's limit of {LORA_RANKS[-1]}"
        raise ConfigError(what, where=adapter.where, fix=fix)
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(r for r in LORA_RANKS if r >= rank),
        "lora_target_modules": modules,
    }


def _sizes(settings: ScorerSettings, vllm_config: Any) -> dict[str, Any]:
    """Choose the number of tokens in one engine step and, on CPU, the size of the KV cache.

    On a GPU, the KV cache gets all memory that vLLM may still use.
    """
    facts = _facts(settings, vllm_config)
    tokens = settings.max_batched_tokens or step_tokens(facts, settings)
    if not vllm_config.scheduler_config.enable_chunked_prefill:
        tokens = max(tokens, settings.max_length_tokens + 1)  # a prompt must fit into one step
    sizes: dict[str, Any] = {"max_num_batched_tokens": tokens, "max_num_seqs": min(MAX_SEQUENCES, tokens)}
    if settings.device == "cpu":
        sizes["kv_cache_memory_bytes"] = kv_cache_bytes(facts, settings.max_length_tokens, tokens)
    return sizes


def _facts(settings: ScorerSettings, vllm_config: Any) -> EngineFacts:
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    kv_values = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    return EngineFacts(
        vocabulary=model.get_vocab_size(),
        value_bytes=4 if settings.dtype == "float32" else 2,
        kv_values_per_token=kv_values,
        v2_runner=vllm_config.use_v2_model_runner,
        tensor_parallel=settings.tensor_parallel,
        device_bytes=current_platform.get_device_total_memory(),  # queries the driver: no CUDA context before a fork
    )


def step_tokens(facts: EngineFacts, settings: ScorerSettings) -> int:
    """Choose the number of tokens in one engine step, so that the logits of these tokens fit in memory.

    vLLM measures the memory of a forward pass, but not that of prompt logits. So the logits must fit in the memory that
    `gpu_memory_fraction` leaves free. A sequence that is longer than a step is computed in several steps.

    Raises:
        ConfigError: not even the logits of a small step fit.
    """
    rows = logits_room_bytes(facts, settings) // logits_bytes_per_row(facts)
    needed = min(settings.max_length_tokens, V2_LOGITS_ROWS) if facts.v2_runner else settings.max_length_tokens
    if rows >= needed:  # logits never have more rows than this, however many sequences a step has
        return most_step_tokens(facts, settings)
    if rows < MIN_STEP_TOKENS:
        raise ConfigError(
            f"the logits of {MIN_STEP_TOKENS} tokens do not fit in the GPU memory that is left free",
            where=f"reference.gpu_memory_fraction={settings.gpu_memory_fraction}",
            fix="decrease gpu_memory_fraction (the default is 0.85), or set reference.max_batched_tokens",
        )
    return rows // 64 * 64


def logits_bytes_per_row(facts: EngineFacts) -> int:
    """Return the peak memory, in bytes, per row of logits. One row belongs to one token of a prompt.

    vLLM's V1 runner loops over requests, its V2 runner over chunks of 1024 rows. The tensors of one iteration are freed
    only after the next iteration has created its own. So at the peak, the V1 runner holds the logits, their float32
    log-softmax, and the log-softmax of the previous iteration. The V2 runner holds the logits of this and of the
    previous iteration, because its kernel outputs only the requested tokens. With tensor parallelism, a second copy of
    the gathered shards exists while they are put in order.
    """
    logits = facts.value_bytes * (1 if facts.tensor_parallel == 1 else 2)
    return facts.vocabulary * (logits + (facts.value_bytes if facts.v2_runner else 4 + 4))


def logits_room_bytes(facts: EngineFacts, settings: ScorerSettings) -> int:
    """Return the number of bytes that are available for logits."""
    if settings.device == "cpu":
        return facts.device_bytes // 16  # other engines and Ray's object store share the machine
    # A small fraction means that other engines share the GPU. A quarter is reserved for CUDA itself and fragmentation.
    return int(facts.device_bytes * min(1 - settings.gpu_memory_fraction, 0.15) * 0.75)


def most_step_tokens(facts: EngineFacts, settings: ScorerSettings) -> int:
    """Return the largest useful number of tokens in one engine step: vLLM's default for offline batches."""
    if settings.device == "cpu":
        return 4096
    return 16384 if facts.device_bytes >= 70 << 30 else 8192


def kv_cache_bytes(facts: EngineFacts, longest_tokens: int, step: int) -> int:
    """Compute the size of the KV cache on CPU, in bytes.

    The cache must hold a prompt until all its completions are computed.

    The completions of a group are adjacent, so a prompt is needed again in the same step or in the next one. Memory for
    four steps and some sequences of the full length is more than enough. The size is at least 256 MiB, so that small
    models can sample many sequences at once.
    """
    tokens = 4 * step + 8 * (longest_tokens + 1 + CPU_BLOCK_TOKENS)
    return max(256 << 20, tokens * facts.kv_values_per_token * facts.value_bytes)
