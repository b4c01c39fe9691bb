"""Calls to an OpenAI-compatible endpoint. A call results in an answer, a temporary trouble, or a permanent error."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from pydantic import BaseModel, Field, ValidationError

from dpo_ray.config.judge import LlmJudge
from dpo_ray.errors import ConfigError, JudgeError, JudgeLostError

from .llm_answers import Answer, Unparsable, parsed
from .llm_limits import Budget

TOO_LONG = (
    "context_length_exceeded",
    "maximum context length",
    "context window",
)  # OpenAI's code; what vLLM and others write
BUSY = (408, 429)  # for these and for 5xx, the same request may succeed later
SHOWN_CHARACTERS = 300
MAX_REPLY_BYTES = 4 << 20  # a thousand times the usual length of an answer
OF_THE_TRANSFER = ("content-encoding", "content-length", "transfer-encoding")  # headers that the decoded body lacks


@dataclass(frozen=True)
class Trouble:
    """The reason why a call gave no answer. The same request may succeed in another call."""

    what: str
    with_answer: bool = False  # the endpoint worked, but the model's text is not a valid answer
    wait_seconds: float = 0.0  # time to wait that the endpoint requests


@dataclass(frozen=True)
class Unanswered:
    """The reason why a request has no answer and is not sent again."""

    why: str


class _Usage(BaseModel):
    prompt_tokens: int = Field(default=0, ge=0)  # a number below 0 would lower the counted cost
    completion_tokens: int = Field(default=0, ge=0)


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Reply(BaseModel):
    """The parts of a chat completion that are used here."""

    choices: list[_Choice]
    usage: _Usage | None = None


class Endpoint:
    """The endpoint that serves the judge's model."""

    def __init__(self, config: LlmJudge, account: Budget, where: str) -> None:
        """Read the API key from the environment.

        Raises:
            ConfigError: the environment variable is missing or cannot be a key.
        """
        self._config, self._account, self._where = config, account, where
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"
        self._key = _key(config)

    def client(self) -> httpx.AsyncClient:
        """Create an HTTP client. Use it only in one event loop."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # `call` limits the time of the whole call; httpx's own limit would apply to each piece of it.
        limits = httpx.Limits(max_connections=self._config.concurrency)
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=None)  # noqa: S113

    async def call(self, client: httpx.AsyncClient, request: dict[str, Any]) -> Answer | Unanswered | Trouble:
        """Send one request, and return the answer or why there is none.

        Raises:
            JudgeError: the endpoint refuses the request for a permanent reason.
        """
        seconds = self._config.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                response = await self._post(client, request)
        except TimeoutError:
            return Trouble(f"the endpoint gave no answer within {seconds:g} s")
        except (httpx.TransportError, httpx.DecodingError) as error:
            return Trouble(self._shown(f"{type(error).__name__}: {error}"))
        if response.status_code == 200:
            return self._read(response)
        message = f"HTTP {response.status_code}: {self._shown(response.text)}"
        if response.status_code in BUSY or response.status_code >= 500:
            return Trouble(message, wait_seconds=_retry_after(response))
        if response.status_code in (400, 413) and any(words in response.text for words in TOO_LONG):
            return Unanswered("the request is longer than the context of the endpoint's model")
        raise JudgeError(message, where=self._where, fix=self._advice(response.status_code))

    async def _post(self, client: httpx.AsyncClient, request: dict[str, Any]) -> httpx.Response:
        """Send a request and read the reply. A reply of more than MAX_REPLY_BYTES is refused."""
        async with client.stream("POST", self._url, json=request) as reply:
            body = bytearray()
            async for chunk in reply.aiter_bytes():
                body += chunk
                if len(body) > MAX_REPLY_BYTES:
                    raise httpx.DecodingError(
                        f"the reply is longer than {MAX_REPLY_BYTES:,} bytes", request=reply.request
                    )
            headers = {name: value for name, value in reply.headers.items() if name not in OF_THE_TRANSFER}
            return httpx.Response(reply.status_code, headers=headers, content=bytes(body), request=reply.request)

    def given_up(self, trouble: Trouble, retries: int) -> JudgeLostError:
        """Build the error that is raised when no retry is left, or when the endpoint asks for too long a wait."""
        what = f"the endpoint gave no answer after {retries} retries; the last failure: {trouble.what}"
        if trouble.wait_seconds:
            what = f"{what}; the endpoint asks to wait {trouble.wait_seconds:.0f} s"
        fix = "check that the endpoint runs; if it is slow, raise timeout_seconds or max_retries, or lower concurrency"
        return JudgeLostError(what, where=self._where, fix=f"{fix}. All answers up to now are stored")

    def _read(self, response: httpx.Response) -> Answer | Trouble:
        try:
            reply = _Reply.model_validate_json(response.content)
        except ValidationError:
            return Trouble(f"the endpoint's reply is not a chat completion: {self._shown(response.text)}")
        if reply.usage is None and self._config.max_usd is not None:
            fix = "remove max_usd, or use an endpoint whose replies contain `usage`"
            raise JudgeError(
                "the endpoint's replies lack `usage`, so max_usd cannot be enforced", where=self._where, fix=fix
            )
        usage = reply.usage or _Usage()
        self._account.answered(usage.prompt_tokens, usage.completion_tokens)
        text = reply.choices[0].message.content if reply.choices else None
        try:
            return parsed(text or "", self._config.mode)
        except Unparsable as error:
            return Trouble(str(error), with_answer=True)

    def _shown(self, text: str) -> str:
        """Cut a text that the endpoint sent to one short line; hide the API key, which some endpoints send back."""
        line = " ".join(text.split())
        return (line.replace(self._key, "***") if self._key else line)[:SHOWN_CHARACTERS]

    def _advice(self, status: int) -> str:
        variable = self._config.api_key_env
        if status in (401, 403):
            if variable is None:
                return "set online.judge.api_key_env to the name of the environment variable that holds the key"
            return f"put a key that may use this model into the environment variable {variable}"
        if status == 404:
            return (
                "check online.judge.base_url (including the version, as in http://host:8000/v1) and online.judge.model"
            )
        if status in (400, 422):
            return "if the endpoint does not support JSON schemas, set online.judge.structured_output=none; else correct the named field"
        return "check online.judge.base_url and the endpoint's own log"


def _key(config: LlmJudge) -> str | None:
    if config.api_key_env is None:
        return None
    where, fix = (
        f"online.judge.api_key_env={config.api_key_env}",
        "set this variable to the endpoint's key before the run",
    )
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ConfigError("the environment variable is not set, or empty", where=where, fix=fix)
    if not (key.isascii() and key.isprintable() and " " not in key):
        what = "the value of the environment variable cannot be a key: it has a space, or is not printable ASCII"
        raise ConfigError(what, where=where, fix=fix)
    return key


def _retry_after(response: httpx.Response) -> float:
    """Return how many seconds the header `retry-after` asks to wait. It has a number of seconds, or a date.

    Return 0 if there is no such header, or if it has another form.
    """
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
