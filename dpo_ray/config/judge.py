"""Judges: which of several completions of a prompt is better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Union, get_args

from pydantic import Field, model_validator

from .base import MOST_CPUS, MOST_GIB, MOST_SECONDS, MOST_TOKENS, StrictModel, field_error
from .extension import JUDGE_CONFIGS, JUDGES, JudgeConfig, installed_configs
from .roles import Gpus, JudgeRole

DOTTED = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$"


class FunctionJudge(JudgeConfig):
    """A Python function that scores completions; the verifiable reward of a world that has one, or anything else."""

    type: Literal["function"] = "function"
    function: str = Field(pattern=DOTTED)
    """Dotted path, `package.module.function`. It is called with (prompts, completions): two lists of strings of one length, and
    returns as many scores, higher is better; None where it abstains."""


class RewardModelJudge(JudgeConfig):
    """A Hugging Face sequence classifier with one output, such as reward models are."""

    type: Literal["reward_model"] = "reward_model"
    path: str = Field(min_length=1)
    """A directory or a hub name."""

    revision: str | None = None
    max_length_tokens: int = Field(default=2048, gt=0, le=MOST_TOKENS)
    """Longer conversations are not judged: their score is missing, with the reason."""

    completions_per_batch: int = Field(default=16, gt=0, le=1_000_000)
    gpus_per_replica: Gpus = 0.0

    not_in_digest: ClassVar[frozenset[str]] = JudgeConfig.not_in_digest | {
        "path",  # its files are, wherever they are
        "revision",
        "completions_per_batch",
        "gpus_per_replica",
    }
    loads_weights: ClassVar[bool] = True

    def gpus(self) -> float:
        return self.gpus_per_replica


class LlmJudge(JudgeConfig):
    """A language model behind an OpenAI-compatible endpoint, asked for a preference or for a score."""

    type: Literal["llm"] = "llm"
    base_url: str = Field(pattern=r"^https?://")
    """Up to and with the version: `http://127.0.0.1:8000/v1`."""

    model: str = Field(min_length=1)
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_]\w*$")
    """Name of the environment variable that holds the key; the key itself never stands in a recipe."""

    mode: Literal["pairwise", "score"] = "pairwise"
    """pairwise: every two completions in both orders, and a contradiction abstains. score: each completion by the rubric, 1 to 10."""

    rubric: str = "helpful, correct, clear and harmless"
    """What the judge is told to look for."""

    max_tokens: int = Field(default=256, gt=0, le=MOST_TOKENS)
    temperature: float = Field(default=0.0, ge=0, le=100)
    structured_output: Literal["json_schema", "none"] = "json_schema"
    """json_schema: ask the endpoint to hold the answer to the schema (`response_format`). none: for endpoints that cannot."""

    concurrency: int = Field(default=8, gt=0, le=10_000)
    """Calls that are open at once, of each replica."""

    requests_per_minute: float | None = Field(default=None, gt=0)
    """Of all replicas together; None: no limit but the endpoint's."""

    timeout_seconds: float = Field(default=60.0, gt=0, le=MOST_SECONDS)
    max_retries: int = Field(default=6, ge=0, le=10_000)
    """Of a call, with back-off, after a refusal for load (429), an error of the server (5xx), a timeout, a broken connection or an
    answer that is not what was asked for."""

    usd_per_million_input_tokens: float = Field(default=0.0, ge=0)
    usd_per_million_output_tokens: float = Field(default=0.0, ge=0)
    max_usd: float | None = Field(default=None, gt=0)
    """Of a round; when it is spent the run stops, and keeps every answer. An ensemble's members spend from one purse."""

    cpus_per_replica: float = Field(default=0.5, ge=0.001, le=MOST_CPUS)
    questions_per_batch: int = Field(default=16, gt=0, le=1_000_000)

    not_in_digest: ClassVar[frozenset[str]] = JudgeConfig.not_in_digest | {
        "api_key_env",
        "concurrency",
        "requests_per_minute",
        "timeout_seconds",
        "max_retries",
        "usd_per_million_input_tokens",
        "usd_per_million_output_tokens",
        "max_usd",
    }

    def environment(self) -> set[str]:
        return {self.api_key_env} if self.api_key_env else set()

    def urls(self) -> set[str]:
        return {self.base_url}

    @model_validator(mode="after")
    def _money_has_prices(self) -> LlmJudge:
        if self.max_usd is not None and not (self.usd_per_million_input_tokens or self.usd_per_million_output_tokens):
            raise field_error("max_usd", "it cannot be held without usd_per_million_input_tokens or ..._output_tokens")
        return self


class VerifierJudge(JudgeConfig):
    """A check of each completion against the prompt's reference answer: 1 where it holds, else 0."""

    type: Literal["verifier"] = "verifier"
    check: Literal["exact", "numeric", "regex", "unit_test"]
    """exact: the same text but for white space and case. numeric: the last number of the completion, within `tolerance`. regex: the
    answer is a pattern that the completion holds. unit_test: the completion's Python code passes the answer's assertions; it
    runs in a process of its own, and the tests in another."""

    extract: str | None = None
    """A regular expression with one group, which takes the answer out of the completion; the last match counts. None: all of it."""

    tolerance: float = Field(default=1e-6, ge=0)
    timeout_seconds: float = Field(default=5.0, gt=0, le=MOST_SECONDS)
    memory_mib: int = Field(default=512, gt=0, le=MOST_GIB << 10)
    """unit_test: the limit of each of its two processes."""

    allow_unconfined: bool = False
    """unit_test: run the code also where it cannot be confined to namespaces of its own, so that it reaches the network and
    other processes; only on a machine that may be lost."""


BuiltIn = FunctionJudge | RewardModelJudge | LlmJudge | VerifierJudge
if TYPE_CHECKING:
    SingleJudge = BuiltIn
else:
    _NAMES = {config.model_fields["type"].default for config in get_args(BuiltIn)}
    SingleJudge = Union[(BuiltIn, *installed_configs(JUDGE_CONFIGS, {*_NAMES, "ensemble"}, JUDGES))]


class Member(StrictModel):
    """One judge of an ensemble."""

    judge: SingleJudge = Field(discriminator="type")
    weight: float = Field(default=1.0, gt=0)


class EnsembleJudge(StrictModel):
    """Several judges; each one's scores are put in ranks within a prompt, and these averaged by weight."""

    type: Literal["ensemble"] = "ensemble"
    members: tuple[Member, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _members_differ(self) -> EnsembleJudge:
        if len({m.judge.model_dump_json() for m in self.members}) < len(self.members):
            raise field_error("members", "two members are the same judge: give one of them more weight instead")
        return self


Judge = Annotated[SingleJudge | EnsembleJudge, Field(discriminator="type")]


def members_of(judge: Judge) -> list[SingleJudge]:
    """List the judges that one is made of: itself, or an ensemble's members."""
    return [member.judge for member in judge.members] if isinstance(judge, EnsembleJudge) else [judge]


def replicas_of(judge: Judge, role: JudgeRole) -> int:
    """Count its processes: each has all members of an ensemble, one at work at a time."""
    return role.count or max(m.replicas for m in members_of(judge))


def cpus_per_replica(judge: Judge, role: JudgeRole) -> float:
    """Return how many CPUs each of its processes requests."""
    return role.cpus or max(m.cpus_per_replica for m in members_of(judge))


def cpus_of(judge: Judge, role: JudgeRole) -> float:
    """Count the CPUs that all its processes hold."""
    return replicas_of(judge, role) * cpus_per_replica(judge, role)
