"""Builds a judge from its section of the recipe, and computes the digest of everything that its verdicts depend on."""

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
"""The function that builds a judge, by the judge's `type`. It is called in the process in which the judge works."""


def make_judge(config: Judge, memory: Memory, device: str = "cpu", spending: Spending | None = None) -> protocol.Judge:
    """Build a judge in this process.

    Args:
        memory: where the judge stores its answers.
        device: device of reward models: `cpu` or `cuda`.
        spending: counts what all judges of this round have spent, for the limit `max_usd`. If it is None, only the costs of
            this judge count.

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
    """Hash everything that can change a judge's verdicts: its settings, and the files of its function or model."""
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
