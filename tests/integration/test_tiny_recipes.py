"""Every recipe of pipelines/ with --tiny: three steps through the real pipeline, with the objective, optimizer, adapters,
sharding and types that it names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from dpo_ray.config.load import load_recipe
from dpo_ray.observe.progress import Reporter
from dpo_ray.online.rounds import online
from dpo_ray.report import summary
from dpo_ray.run.offline import offline
from dpo_ray.run.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")
REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (REPOSITORY / "pipelines").glob("*.yaml") if "online" not in path.stem)

# The first step's loss, by hand: policy and reference are the same then, so every log-ratio is 0. In bfloat16 they are the
# same but for rounding, which beta multiplies. Without a reference, a random model is nearly indifferent among 704 tokens.
LN_2 = math.log(2)
FIRST_LOSS = {
    "zephyr_7b_dpo": pytest.approx(LN_2, abs=1e-3),  # -log sigmoid(0)
    "zephyr_7b_ipo": pytest.approx((1 / (2 * 0.01)) ** 2, rel=1e-2),  # (0 - 1 / (2 beta))^2
    "zephyr_7b_kto": pytest.approx(0.5, abs=1e-2),  # 1 - sigmoid(0)
    "mistral_7b_orpo": pytest.approx(math.log(704) + 0.1 * LN_2, rel=0.1),  # likelihood of a token, and even odds
    "llama3_8b_simpo": pytest.approx(math.log1p(math.exp(1.375)), rel=0.2),  # -log sigmoid(0 - gamma)
    "hermes_7b_dpo_lora": pytest.approx(LN_2, abs=1e-2),
    "tulu3_8b_dpo": pytest.approx(LN_2, abs=5e-2),
    "tulu3_70b_dpo": pytest.approx(LN_2, abs=5e-2),
    "quickstart": pytest.approx(LN_2, abs=1e-5),
    "hh_rlhf": pytest.approx(LN_2, abs=1e-5),
    "hh_pandalm": pytest.approx(LN_2, abs=1e-5),
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


# One with an adapter stands for the others where time is short.
OFTEN = ("hermes_7b_dpo_lora",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in OFTEN else pytest.mark.long) for n in RECIPES]
)
def test_three_steps_from_end_to_end(name: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(output / "cache"))
    full = load_recipe(REPOSITORY / "pipelines" / f"{name}.yaml", [f"output={output}"])
    finished, ran = offline(tiny_recipe(full), Reporter())
    assert ran
    steps = [json.loads(line) for line in finished.train.read_bytes("metrics.jsonl").splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(math.isfinite(value) for step in steps for value in step.values() if isinstance(value, float))
    assert steps[0]["loss"] == FIRST_LOSS[name]
    if finished.reference is not None:
        assert finished.train.manifest.figures["audit"]["passed"]
    figures = summary.figures(finished)
    assert figures["steps"] == 3
    assert Path(summary.write_report(finished)) == output / f"{full.name}-tiny" / "report.html"
    policy = Path(figures["policy"])
    if full.train.lora is not None:
        assert (policy / "adapter_model.safetensors").is_file()
    else:
        assert AutoModelForCausalLM.from_pretrained(policy).config.num_hidden_layers == 2


@pytest.mark.long
def test_two_rounds_of_the_online_recipe(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(output / "cache"))
    recipe = tiny_recipe(load_recipe(REPOSITORY / "pipelines" / "quickstart_online.yaml", [f"output={output}"]))
    rounds, ran = online(recipe, Reporter())
    assert ran
    assert [r.committed.promoted for r in rounds.rounds] == [True, True]
