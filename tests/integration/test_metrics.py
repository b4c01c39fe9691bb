"""A real run on a real Ray cluster, and what the metrics port, and a real Prometheus, say of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.local_cluster import free_port
from tests.helpers.prometheus import Prometheus, Scrapes, prometheus_server
from tests.integration.conftest import small_recipe
from tools.dashboard import DASHBOARD, expression, panels

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
STEPS = 60
STARTS = 4  # Ray gives up after 30 s, which is too short on a busy machine


@dataclass
class Observed:
    """A Ray cluster of one node, all scrapes of its metrics port, and the Prometheus that scrapes it as well."""

    address: str
    environment: dict[str, str]
    directory: Path
    scrapes: Scrapes
    prometheus: Prometheus | None

    def run(self, name: str, *overrides: str, address: str = "", **changes: str) -> tuple[int, str]:
        """Run `dpo-ray run` with a small recipe as a person would; return the exit code and what was printed."""
        recipe = small_recipe(self.directory / "runs", f"name={name}", *overrides)
        values = recipe.model_dump(mode="json", exclude_unset=True) | {"ray": {"address": address or self.address}}
        path = self.directory / f"{name}.yaml"
        path.write_text(json.dumps(values))
        done = subprocess.run(
            [sys.executable, "-m", "dpo_ray", "run", str(path)],
            env=self.environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout


@contextmanager
def ray_head(environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Start a Ray cluster of one node, without a dashboard; yield the address of Ray and that of the metrics port."""
    port, metrics_port = free_port(), free_port()
    directory = tempfile.mkdtemp(prefix="dpo-ray-metrics-")  # sockets want short paths
    options = [f"--port={port}", f"--metrics-export-port={metrics_port}", f"--temp-dir={directory}/ray", "--num-cpus=4"]
    options += ["--include-dashboard=false", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
    ray, log = Path(sys.executable).with_name("ray"), Path(directory, "log")
    for _ in range(STARTS):
        with log.open("w") as output:
            head = subprocess.Popen([ray, "start", "--head", *options], env=environment, stdout=output, stderr=output)
        while head.poll() is None and "Ray runtime started" not in log.read_text():
            time.sleep(0.2)
        if head.poll() is None:
            break
    try:
        assert head.poll() is None, log.read_text()
        yield f"127.0.0.1:{port}", f"127.0.0.1:{metrics_port}"
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    directory = tmp_path_factory.mktemp("metrics")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_metrics_report_interval_ms": "1000", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    with ray_head(environment) as (address, target), prometheus_server(directory, target) as prometheus:
        scrapes = Scrapes(target)
        with scrapes.running():
            yield Observed(address, environment, directory, scrapes, prometheus)


@pytest.fixture(scope="module")
def rows(observed: Observed) -> list[dict[str, float]]:
    """The rows of metrics.jsonl of a run that needs no engine."""
    code, out = observed.run("small", "train.objective={type: simpo}", f"train.steps={STEPS}")
    assert code == 0, out
    lines = (observed.directory / "runs/small/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_what_is_scraped_while_it_trains_is_what_the_run_writes(
    observed: Observed, rows: list[dict[str, float]]
) -> None:
    for name, column in (
        ("train_step", "step"),
        ("train_loss", "loss"),
        ("train_reward_accuracy_ratio", "rewards/accuracies"),
        ("train_tokens_per_second", "tokens_per_second"),
        ("heldout_loss", "eval_loss"),
    ):
        values, written = observed.scrapes.values(name, run="small"), [row[column] for row in rows if column in row]
        assert values, name
        assert set(values) <= set(written), name
        assert values[-1] == written[-1], name
    steps = observed.scrapes.values("train_step", run="small")
    assert steps == sorted(steps)
    assert len(set(steps)) > 1  # it was seen while it trained
    assert set(observed.scrapes.values("train_planned_steps", run="small")) == {STEPS}


def test_gauges_end_with_the_driver_and_counters_stay(observed: Observed, rows: list[dict[str, float]]) -> None:
    until = time.monotonic() + 20
    while observed.scrapes.scrapes[-1].get(("ray_dpo_ray_train_loss", (("run", "small"),))) is not None:
        assert time.monotonic() < until
        time.sleep(0.5)
    assert observed.scrapes.scrapes[-1]["ray_dpo_ray_train_starts_total", (("run", "small"),)] == 1
    assert not observed.scrapes.values("run_failures_total", run="small")


def test_prometheus_answers_the_queries_of_the_dashboard(observed: Observed, rows: list[dict[str, float]]) -> None:
    if observed.prometheus is None:
        pytest.skip("there is no program `prometheus` here (Debian's package prometheus)")
    last = 'max by (run) (last_over_time(ray_dpo_ray_train_loss{run="small"}[1h]))'
    (result,) = observed.prometheus.query(last)
    assert float(result["value"][1]) == pytest.approx(rows[-1]["loss"])
    (result,) = observed.prometheus.query('max_over_time(ray_dpo_ray_train_step{run="small"}[1h])')
    assert float(result["value"][1]) == STEPS
    for panel in panels(DASHBOARD):
        for target in panel.targets:
            observed.prometheus.query(expression(target.expression, "small"))  # fails if Prometheus refuses it


def test_engines_the_audit_and_the_stages_are_seen_too(observed: Observed) -> None:
    code, out = observed.run("scored", "train.steps=4", "evaluate.sample_prompts=4")
    assert code == 0, out
    scrapes = observed.scrapes
    assert scrapes.values("data_rows", run="scored", split="train", outcome="admitted")[-1] == 96
    assert scrapes.values("reference_completions_total", run="scored", source="engine")[-1] == 2 * (96 + 24)
    assert scrapes.values("reference_groups", run="scored", state="done")[-1] == 96 + 24
    assert scrapes.values("reference_groups", run="scored", state="waiting")[-1] == 0
    assert 1 in scrapes.values("engines", run="scored", state="starting")
    run = ("run", "scored")
    training = [s for s in scrapes.scrapes if s.get(("ray_dpo_ray_stage_active", (run, ("stage", "train")))) == 1]
    states = [("ray_dpo_ray_engines", (run, ("state", state))) for state in ("starting", "idle", "busy")]
    assert {scrape[state] for scrape in training for state in states} == {0}
    assert scrapes.values("audit_passed", run="scored")[-1] == 1
    assert 0 < scrapes.values("audit_token_drift_nats", run="scored", statistic="max")[-1] < 1e-4
    for stage in ("reference", "train", "evaluate"):
        assert 1 in scrapes.values("stage_active", run="scored", stage=stage), stage
    assert set(scrapes.values("lease_held", run="scored")) == {1}
    assert scrapes.values("output_free_bytes", run="scored")[-1] > 0


def test_a_run_does_not_need_the_metrics_of_ray(observed: Observed) -> None:
    code, out = observed.run(
        "quiet", "train.objective={type: simpo}", "train.steps=2", address="local", RAY_enable_metrics_collection="0"
    )
    assert code == 0, out
    assert "steps=2" in out
    assert "metrics are no longer exported" not in out
