"""The judge that is a language model, asking a real vLLM server on loopback."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.judge import LlmJudge
from dpo_ray.errors import JudgeError
from dpo_ray.models.builtin import builtin_model
from dpo_ray.online.judges.make import judge_digest, make_judge
from dpo_ray.online.judges.memory import JournalMemory
from dpo_ray.online.judges.protocol import Question, Usage, Verdict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}"
CONTEXT_TOKENS = 2048
# In eager mode and unbound it starts in a minute on two cores.
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "127.0.0.1",
}
QUESTIONS = [
    Question("the film was", ("good and great", "bad , dull and far too long")),
    Question("i saw it and", ("loved the cast", "it was fine", "left before the end")),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the built-in model; its weights know nothing of judging, but its answers are held to the schema."""
    directory = tmp_path_factory.mktemp("server")
    template, log = directory / "template.jinja", directory / "log"
    template.write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(builtin_model("sentiment_llama")), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--chat-template", str(template), "--api-key", "made-key"]
    # The prompts are longer than the context it was trained with; rotary positions go on.
    command += ["--hf-overrides", json.dumps({"max_position_embeddings": CONTEXT_TOKENS})]
    command += ["--max-model-len", str(CONTEXT_TOKENS), "--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    # A model that knows no JSON would fill its answer with the white space that JSON allows.
    command += ["--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | ENVIRONMENT)
    try:
        deadline = time.monotonic() + 300
        while not answers(port):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # Without it, CPython 3.11.7 ended sessions of this file alone with a SystemError of its parser, in pytest's last plugin.
        gc.collect()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADE_ENDPOINT_KEY", "made-key")


def asked(path: Path, config: LlmJudge, questions: Sequence[Question] = QUESTIONS) -> tuple[list[Verdict], Usage]:
    judge = make_judge(config, JournalMemory(Storage(path), judge_digest(config), "one"))
    verdicts = dict(judge.judge(questions))
    return [verdicts[i] for i in range(len(questions))], judge.usage


def config(server: str, **changed: object) -> LlmJudge:
    settings = {"base_url": server, "model": "tiny", "api_key_env": "MADE_ENDPOINT_KEY", "max_tokens": 32}
    return LlmJudge.model_validate(settings | changed)


def test_preferences(server: str, tmp_path: Path) -> None:
    verdicts, usage = asked(tmp_path, config(server))
    assert usage.calls == 2 * (1 + 3)
    assert usage.retries == 0  # every answer was what the schema allows
    assert usage.input_tokens > 1000
    assert usage.output_tokens >= 8
    for verdict, question in zip(verdicts, QUESTIONS, strict=True):
        assert len(verdict.scores) == len(question.completions)
        assert (None in verdict.scores) == ("contradict" in verdict.reason)  # the one way in which it abstains here
        assert all(s is None or 0 <= s <= 1 for s in verdict.scores)
    again, nothing = asked(tmp_path, config(server, concurrency=1))
    assert (again, nothing) == (verdicts, Usage())


def test_scores(server: str, tmp_path: Path) -> None:
    verdicts, usage = asked(tmp_path, config(server, mode="score", usd_per_million_input_tokens=3.0))
    assert all(s in range(1, 11) for v in verdicts for s in v.scores)
    assert usage.calls == 5
    assert usage.usd == pytest.approx(3e-6 * usage.input_tokens)
    assert asked(tmp_path, config(server, mode="score")) == (verdicts, Usage())


def test_without_a_schema_it_rambles_and_the_judge_abstains(server: str, tmp_path: Path) -> None:
    verdicts, usage = asked(tmp_path, config(server, structured_output="none", max_retries=1))
    assert {s for v in verdicts for s in v.scores} == {None}
    assert (usage.calls, usage.retries) == (16, 8)


def test_too_long_for_its_context(server: str, tmp_path: Path) -> None:
    completions = ("good", "bad " * CONTEXT_TOKENS)
    (verdict,), usage = asked(tmp_path, config(server, mode="score"), [Question("the film was", completions)])
    assert verdict.scores[0] in range(1, 11)
    assert verdict.scores[1] is None
    assert "longer than the context" in verdict.reason
    assert usage.calls == 1


@pytest.mark.parametrize(
    ("changed", "said"), [({"model": "other"}, "HTTP 404"), ({"api_key_env": None}, "HTTP 401")], ids=["model", "key"]
)
def test_refused(server: str, tmp_path: Path, changed: dict[str, object], said: str) -> None:
    with pytest.raises(JudgeError, match=said):
        asked(tmp_path, config(server, **changed))
