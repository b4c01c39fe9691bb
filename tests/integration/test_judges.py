"""The pool of judges on real Ray: what the batches of a round cost counts against one budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_ray.artifacts.storage import Storage
from dpo_ray.config.judge import LlmJudge
from dpo_ray.config.roles import JudgeRole
from dpo_ray.errors import JudgeError
from dpo_ray.online.judges.protocol import Question
from dpo_ray.online.judging import Judges
from tests.helpers.fakes.endpoint import longer_is_better, made_endpoint

pytestmark = pytest.mark.usefixtures("ray_cluster")
PRICES = {"usd_per_million_input_tokens": 10_000.0, "usd_per_million_output_tokens": 100_000.0}  # 2 USD a call
QUESTIONS = [Question(f"p{i}", ("x", "yy")) for i in range(6)]  # two calls each, in both orders


def test_a_budget_is_that_of_all_batches_of_a_round(tmp_path: Path) -> None:
    with made_endpoint(longer_is_better) as endpoint:
        values = {"base_url": endpoint.base_url, "model": "made", "concurrency": 1, "questions_per_batch": 1, **PRICES}
        judge = LlmJudge.model_validate(values | {"max_usd": 9.0})
        judges = Judges(judge, JudgeRole(count=1), Storage(tmp_path), "run", "cpu", lambda text: None)
        try:
            with pytest.raises(JudgeError, match="max_usd=9 is spent"):
                judges.ask(QUESTIONS, lambda done: None)
        finally:
            judges.close()
        assert len(endpoint.calls) == 5  # the fifth call goes beyond 9 USD
