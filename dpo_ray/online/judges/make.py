"""From a judge's section of the recipe to the judge that works, and to the digest of what its verdicts depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpo_ray.artifacts.digest import digest
from dpo_ray.config.extension import JUDGES, installed, packages_of
from dpo_ray.config.judge import EnsembleJudge, FunctionJudge, Judge, LlmJudge, RewardModelJudge

from . import protocol
from .ensemble import JudgeByEnsemble
from .function import JudgeByFunction, source_digest
from .llm import JudgeByLlm
from .llm_answers import PROMPT_VERSION
from .memory import Section
from .protocol import Memory, Spending
from .verifier import JudgeByVerifier


def _reward_model(config: RewardModelJudge, memory: Memory, device: str, _: Spending) -> protocol.Judge:
    from .reward_model import JudgeByRewardModel  # torch and transformers

    return JudgeByRewardModel(config, memory, device)


_BUILT_IN: dict[str, Callable[[Any, Memory, str, Spending], protocol.Judge]] = {
    "function": lambda config, memory, device, spending: JudgeByFunction(config, memory),
    "reward_model": _reward_model,
    "llm": lambda config, memory, device, spending: JudgeByLlm(config, memory, spending),
    "verifier": lambda config, memory, device, spending: JudgeByVerifier(config, memory),
}
MAKERS = _BUILT_IN | installed(JUDGES, _BUILT_IN)
"""By the judge's `type`: what builds the judge, in the process where it works."""


def make_judge(config: Judge, memory: Memory, device: str = "cpu", spending: Spending | None = None) -> protocol.Judge:
    """Build a judge, in the process where it works.

    Args:
        device: of reward models: `cpu` or `cuda`.
        spending: what the round has cost, against `max_usd`; None: all that this judge spends counts.

    Raises:
        ConfigError: a function, model, pattern or key is missing or not usable.
    """
    spending = spending or Spending()
    if not isinstance(config, EnsembleJudge):
        return MAKERS[config.type](config, memory, device, spending)
    members = {}
    for number, member in enumerate(config.members, 1):
        section = Section(memory, judge_digest(member.judge))
        members[f"{number}_{member.judge.type}"] = make_judge(member.judge, section, device, spending), member.weight
    return JudgeByEnsemble(members)


def judge_digest(config: Judge) -> str:
    """Hash everything that can change a judge's verdicts: its settings, a function's source file, a reward model's files."""
    if isinstance(config, EnsembleJudge):
        members = [[judge_digest(m.judge), m.weight] for m in config.members]
        return digest({"type": config.type, "members": members})
    settings = config.model_dump(mode="json", exclude=set(config.not_in_digest)) | config.identity()
    match config:
        case FunctionJudge():
            settings["source"] = source_digest(config.function)
        case LlmJudge():
            settings["prompt_version"] = PROMPT_VERSION
        case RewardModelJudge():
            from .reward_model import reward_model_identity  # torch and transformers

            settings["files"] = reward_model_identity(config)
    if packages := packages_of(JUDGES, {config.type}):
        settings["packages"] = packages
    return digest(settings)
