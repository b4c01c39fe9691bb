"""The configuration of judges, which decide which of several completions of a prompt is better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Union, get_args

from pydantic import Field, model_validator

from .base import MOST_CPUS, MOST_GIB, MOST_SECONDS, MOST_TOKENS, StrictModel, field_error
from .extension import JUDGE_CONFIGS, JUDGES, JudgeConfig, installed_configs
from .roles import Gpus, JudgeRole

DOTTED = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$"


class FunctionJudge(JudgeConfig):
    """A Python function that scores completions, for example by a reward that can be computed exactly."""

    type: Literal["function"] = "function"
    function: str = Field(pattern=DOTTED)
    """Dotted path `package.module.function`. The function is called with two lists of strings of equal length, (prompts,
    completions). It returns a list with a score for each completion: a higher score is better, None means no score."""


class RewardModelJudge(JudgeConfig):
    """A reward model: a Hugging Face sequence classifier with one output, which is the score."""

    type: Literal["reward_model"] = "reward_model"
    path: str = Field(min_length=1)
    """A directory, or a name on the Hugging Face hub."""

    revision: str | None = None
    max_length_tokens: int = Field(default=2048, gt=0, le=MOST_TOKENS)
    """Longest conversation that is judged. A longer one gets no score, and the reason is recorded."""

    completions_per_batch: int = Field(default=16, gt=0, le=1_000_000)
    gpus_per_replica: Gpus = 0.0

    not_in_digest: ClassVar[frozenset[str]] = JudgeConfig.not_in_digest | {
        "path",  # the digest covers the files themselves, wherever they are
        "revision",
        "completions_per_batch",
        "gpus_per_replica",
    }
    loads_weights: ClassVar[bool] = True

    def gpus(self) -> float:
        return self.gpus_per_replica


class LlmJudge(JudgeConfig):
    """A language model behind an OpenAI-compatible endpoint. It returns preferences between completions, or scores."""

    type: Literal["llm"] = "llm"
    base_url: str = Field(pattern=r"^https?://")
    """Address of the endpoint, including the API version, such as `http://127.0.0.1:8000/v1`."""

    model: str = Field(min_length=1)
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_]\w*$")
    """Name of the environment variable that holds the API key. The key itself is never part of a recipe."""

    mode: Literal["pairwise", "score"] = "pairwise"
    """pairwise: the model compares every two completions, in both orders; contradictory answers do not count. score: the
    model scores each completion from 1 to 10."""

    rubric: str = "helpful, correct, clear and harmless"
    """The criteria by which completions are judged. This text is part of the judge's prompt."""

    max_tokens: int = Field(default=256, gt=0, le=MOST_TOKENS)
    temperature: float = Field(default=0.0, ge=0, le=100)
    structured_output: Literal["json_schema", "none"] = "json_schema"
    """json_schema: ask the endpoint for an answer that follows a JSON schema (`response_format`). none: leave the
    schema out, for an endpoint that does not support schemas."""

    concurrency: int = Field(default=8, gt=0, le=10_000)
    """Largest number of calls that each replica makes at the same time."""

    requests_per_minute: float | None = Field(default=None, gt=0)
    """Largest number of calls per minute by all replicas together. null: no limit, except that of the endpoint."""

    timeout_seconds: float = Field(default=60.0, gt=0, le=MOST_SECONDS)
    max_retries: int = Field(default=6, ge=0, le=10_000)
    """How often a call is repeated, after growing pauses, if the server is overloaded (429) or fails (5xx), if the
    connection breaks or times out, or if the answer does not have the requested form."""

    usd_per_million_input_tokens: float = Field(default=0.0, ge=0)
    usd_per_million_output_tokens: float = Field(default=0.0, ge=0)
    max_usd: float | None = Field(default=None, gt=0)
    """Budget of one round in US dollars, for all members of an ensemble together. When it is spent, the run stops; all
    answers so far are kept."""

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
            raise field_error(
                "max_usd", "this limit needs prices: set usd_per_million_input_tokens or usd_per_million_output_tokens"
            )
        return self


class VerifierJudge(JudgeConfig):
    """A judge that checks completions against the prompt's reference answer. The score is 1 if the check passes, else 0."""

    type: Literal["verifier"] = "verifier"
    check: Literal["exact", "numeric", "regex", "unit_test"]
    """exact: the completion equals the answer, apart from white space and case. numeric: the last number of the
    completion differs from the answer by at most `tolerance`. regex: the answer is a regular expression that must match
    somewhere in the completion. unit_test: the completion is Python code, and the answer is assertions that the code
    must pass. The code and the assertions run in two separate processes."""

    extract: str | None = None
    """A regular expression with one group. Only the text of this group in the last match is checked. null: the complete
    completion is checked."""

    tolerance: float = Field(default=1e-6, ge=0)
    timeout_seconds: float = Field(default=5.0, gt=0, le=MOST_SECONDS)
    memory_mib: int = Field(default=512, gt=0, le=MOST_GIB << 10)
    """unit_test: memory limit of each of the two processes."""

    allow_unconfined: bool = False
    """unit_test: run the code even if this machine cannot confine it to its own namespaces. The code can then access
    the network and other processes. So use this only on a machine without anything of value."""


BuiltIn = FunctionJudge | RewardModelJudge | LlmJudge | VerifierJudge
if TYPE_CHECKING:
    SingleJudge = BuiltIn
else:
    _NAMES = {config.model_fields["type"].default for config in get_args(BuiltIn)}
    SingleJudge = Union[(BuiltIn, *installed_configs(JUDGE_CONFIGS, {*_NAMES, "ensemble"}, JUDGES))]


class Member(StrictModel):
    """One judge of an ensemble, and its weight."""

    judge: SingleJudge = Field(discriminator="type")
    weight: float = Field(default=1.0, gt=0)


class EnsembleJudge(StrictModel):
    """Several judges. Each one ranks a prompt's completions. A completion's score is the weighted mean of its ranks."""

    type: Literal["ensemble"] = "ensemble"
    members: tuple[Member, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _members_differ(self) -> EnsembleJudge:
        if len({m.judge.model_dump_json() for m in self.members}) < len(self.members):
            raise field_error("members", "two members are the same judge: keep one of them, and increase its weight")
        return self


Judge = Annotated[SingleJudge | EnsembleJudge, Field(discriminator="type")]


def members_of(judge: Judge) -> list[SingleJudge]:
    """List the members of a judge that is an ensemble. For any other judge, list only the judge itself."""
    return [member.judge for member in judge.members] if isinstance(judge, EnsembleJudge) else [judge]


def replicas_of(judge: Judge, role: JudgeRole) -> int:
    """Return how many processes a judge has. Each process of an ensemble holds all members, and runs one at a time."""
    return role.count or max(m.replicas for m in members_of(judge))


def cpus_per_replica(judge: Judge, role: JudgeRole) -> float:
    """Return how many CPUs each process of a judge requests."""
    return role.cpus or max(m.cpus_per_replica for m in members_of(judge))


def cpus_of(judge: Judge, role: JudgeRole) -> float:
    """Return how many CPUs all processes of a judge request together."""
    return replicas_of(judge, role) * cpus_per_replica(judge, role)
