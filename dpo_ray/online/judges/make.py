"""From a judge's section of the recipe to the judge that works, and to the digest of what makes its verdicts."""

from __future__ import annotations

from typing import Any

from dpo_ray.artifacts.digest import digest
from dpo_ray.config.judge import EnsembleJudge, FunctionJudge, Judge, LlmJudge, RewardModelJudge, VerifierJudge

from . import protocol
from .ensemble import Ensemble
from .function import FunctionScorer, source_digest
from .llm import LlmAsker
from .llm_answers import PROMPT_VERSION
from .memory import Section
from .protocol import Memory, Spending
from .verifier import Verifier

# Fields that change how a judge works and not what it says.
WORKING = {"replicas", "cpus_per_replica", "gpus_per_replica", "questions_per_batch", "completions_per_batch"}
LLM_WORKING = WORKING | {
    "api_key_env",
    "concurrency",
    "requests_per_minute",
    "timeout_seconds",
    "max_retries",
    "usd_per_million_input_tokens",
    "usd_per_million_output_tokens",
    "max_usd",
}


def make_judge(config: Judge, memory: Memory, device: str = "cpu", spending: Spending | None = None) -> protocol.Judge:
    """Make a judge, in the process where it is to work.

    Args:
        device: of reward models: `cpu` or `cuda`.
        spending: what the round has cost, against `max_usd`; None: all that this judge spends counts.

    Raises:
        ConfigError: a function, model, pattern or key is not there or not usable.
    """
    match config:
        case FunctionJudge():
            return FunctionScorer(config, memory)
        case RewardModelJudge():
            from .reward_model import RewardModelScorer  # torch and transformers

            return RewardModelScorer(config, memory, device)
        case LlmJudge():
            return LlmAsker(config, memory, spending or Spending())
        case VerifierJudge():
            return Verifier(config, memory)
        case EnsembleJudge():
            shared = spending or Spending()
            return Ensemble(
                {
                    f"{number}_{m.judge.type}": (
                        make_judge(m.judge, Section(memory, judge_digest(m.judge)), device, shared),
                        m.weight,
                    )
                    for number, m in enumerate(config.members, 1)
                }
            )


def judge_digest(config: Judge) -> str:
    """Hash all that can change a judge's verdicts: its settings, a function's source file, a reward model's files."""
    settings: dict[str, Any]
    match config:
        case EnsembleJudge():
            settings = {"type": config.type, "members": [[judge_digest(m.judge), m.weight] for m in config.members]}
        case LlmJudge():
            settings = config.model_dump(mode="json", exclude=LLM_WORKING) | {"prompt_version": PROMPT_VERSION}
        case FunctionJudge():
            settings = config.model_dump(mode="json", exclude=WORKING) | {"source": source_digest(config.function)}
        case RewardModelJudge():
            from .reward_model import reward_model_identity  # torch and transformers

            settings = {"type": config.type, "max_length_tokens": config.max_length_tokens}
            settings["files"] = reward_model_identity(config)
        case VerifierJudge():
            settings = config.model_dump(mode="json", exclude=WORKING)
    return digest(settings)
