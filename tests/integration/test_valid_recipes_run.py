"""A recipe that `validate` calls valid is not refused later: each goes through the whole pipeline, with little data."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from dpo_ray.cli.app import main
from dpo_ray.cli.recipe import validate
from dpo_ray.cluster.requests import local_memory_bytes
from dpo_ray.cluster.session import DRIVER_ENVIRONMENT, WORKER_ENVIRONMENT
from dpo_ray.errors import AuditError, DpoRayError, TrainError
from tests.conftest import REPOSITORY
from tests.helpers.random_overrides import random_overrides

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
BUDGET_SECONDS = 1500.0  # of all random recipes together
SMALL = {  # given last, so that they win
    "data.train": "{type: synthetic, pairs: 32}",
    "data.eval": "{type: synthetic, pairs: 8}",
    "train.steps": "2",
    "train.groups_per_step": "8",
    "train.workers": "1",
    "train.eval_every_steps": "1",
    "evaluate.sample_prompts": "4",
    "evaluate.max_new_tokens": "8",
    "reference.audit.groups": "8",
}
FOUND_LATER = (AuditError.exit_code, TrainError.exit_code)  # what depends on the values that training computes

SINGLE = [
    *(f"train.optimizer.type={kind}" for kind in ("adamw_8bit", "paged_adamw", "rmsprop", "adafactor")),
    *(f"train.optimizer={value}" for value in ("{eps: 1e-30}", "{betas: [0, 0]}", "{warmup_steps: 100000000}")),
    *("train.optimizer.max_grad_norm=null", "train.optimizer={decay: wsd, decay_fraction: 1}"),
    *("train.layout=packed", "train.layout=padded", "train.compile=true", "train.sharding.cpu_offload=true"),
    *("train.activation_checkpointing=selective", "train.activation_checkpointing=full"),
    *("train.sharding={mode: hybrid, shard_workers: 1}", "train.min_workers=1", "train.max_failures=0"),
    *("train.lora={rank: 512}", "train.lora={rank: 600, merge: true}", "train.lora={target_modules: [q_proj]}"),
    *("train.lora={dropout: 0.5}", "train.lora={target_modules: [up_proj, down_proj], alpha: 0.001}"),
    *("train.tokens_per_micro_batch=1", "train.logprob_chunk_tokens=1", "train.groups_per_step=10000000"),
    *("train.entropy_every_steps=null", "train.eval_every_steps=null", "train.checkpoint_every_steps=null"),
    *("train.keep_checkpoints=1000000", "train.hang_seconds=100000000", "train.router_aux_loss=0"),
    *("train.best={metric: eval_entropy, mode: min, patience: 1}", "train.best={metric: eval_length_bias}"),
    *("train.objective.type=kto", "train.objective.type=simpo", "train.shaping={wpo: true, ld_alpha: 0}"),
    *("reference.engine=trainer", "reference.mode=streaming", "reference.max_batched_tokens=1", "reference.replicas=2"),
    *("reference.gpu_memory_fraction=0.001", "reference.groups_per_granule=1", "reference.share_prompt=false"),
    *("reference.tensor_parallel=2", "reference.audit.groups=0", "reference.max_replicas=3"),
    *(
        "evaluate.temperature=0.01",
        "evaluate.temperature=100",
        "evaluate.max_new_tokens=100",
        "evaluate.sample_prompts=0",
    ),
    *("data.rows_per_part=1", "data.truncation=drop", "data.max_prompt_tokens=8", "data.rules.near_duplicates=0.5"),
    *("data.rules.control_characters=clean", "data.pairing={annotators: unanimous}", "model.dtype=bfloat16"),
    *("cluster.roles.train.cpus=0.001", "cluster.roles.reference.cpus=64", "cluster.roles.prepare={count: 1, cpus: 3}"),
    *("cluster.roles.sample.cpus=16", "cluster.roles.train.memory_gib=0.1", "cluster.roles.prepare.memory_gib=0.5"),
    *("seed=2147483647", "trackers=[]", "ray.cpus=9"),
]


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """Start a Ray that offers what any of the recipes requests; by themselves, each would start its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in (DRIVER_ENVIRONMENT | WORKER_ENVIRONMENT).items():
            patch.setenv(name, value)
        ray.init("local", num_cpus=1_000, include_dashboard=False, log_to_driver=False, _memory=local_memory_bytes())
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that what is equal is done once."""
    return tmp_path_factory.mktemp("valid")


@pytest.mark.parametrize("override", SINGLE)
def test_a_valid_field_does_not_stop_a_run(override: str, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, text = override.partition("=")
    small = {field: value for field, value in SMALL.items() if field != path}
    fault = disagreement(f"single-{SINGLE.index(override)}", {path: text, **small}, output, capsys)
    assert not fault, fault


def test_random_valid_recipes_run(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began, seed, faults = time.monotonic(), 0, []
    while time.monotonic() - began < BUDGET_SECONDS:
        drawn = random_overrides(random.Random(10**6 + seed), online=False)
        kept = {path: text for path, text in drawn.items() if path not in ("name", "output")}
        if fault := disagreement(f"random-{seed}", {**kept, **SMALL}, output, capsys):
            faults.append(f"seed {seed}: {fault}")
        seed += 1
    assert not faults, "\n".join(faults)


def disagreement(name: str, overrides: dict[str, str], output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a recipe if it is valid; return how the run ended if that should have been found before. Empty otherwise."""
    base = REPOSITORY / "pipelines/quickstart.yaml"
    arguments = [f"name={name}", f"output={output}", *(f"{path}={text}" for path, text in overrides.items())]
    try:
        validate(base, arguments)
    except DpoRayError:
        return ""
    code: object = None
    try:
        main(["run", str(base), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    except Exception as error:
        return f"{type(error).__name__}: {error}: {arguments}"
    error = capsys.readouterr().err
    return "" if code in (0, *FOUND_LATER) and "Traceback" not in error else f"exit {code}: {error}: {arguments}"
