"""The quickstart from `apply` to its result, against the same recipe on this machine; then the daily work with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.real_cluster import ROOT, Command, RealCluster

NAME = "whole"
RECIPE = str(ROOT / "pipelines" / "quickstart.yaml")
RELATIVE = 1e-4  # two kinds of CPUs add in another order; on one machine all digits are the same
MEASURED = ("loss", "rewards/margins", "rewards/accuracies", "num_tokens", "eval_loss", "eval_rewards/accuracies")
EXACT = ("rows_in", "admitted", "quarantined", "duplicates", "steps", "scored", "unscored", "audit")


@pytest.fixture(scope="module")
def run(here: RealCluster) -> Iterator[Command]:
    with here.run(NAME) as command:
        yield command


@pytest.fixture(scope="module")
def downloaded(here: RealCluster, run: Command) -> Path:
    """Wait for the end of the run, and download its results."""
    assert run.end(900) == 0, run.text
    done = here.dpo_ray("kubernetes", "download", NAME, "--namespace", here.namespace, "--to", "cluster")
    assert done.returncode == 0, done.stderr
    return here.directory / "cluster"


def test_the_driver_writes_its_first_line_within_20_s_of_apply(run: Command) -> None:
    assert run.wait_for(r"^attempt 1; its logs are kept", 300) < 20


def test_its_figures_are_those_of_a_local_run(here: RealCluster, run: Command, downloaded: Path) -> None:
    local = here.directory / "local"
    command = [sys.executable, "-m", "dpo_ray", "run", RECIPE, f"output={local}"]
    done = subprocess.run(command, check=True, timeout=900, capture_output=True, text=True, cwd=here.directory)
    expected, found = (_metrics(directory) for directory in (local / "quickstart", downloaded))
    assert len(found) == 100
    for here_row, there_row in zip(found, expected, strict=True):
        assert here_row == pytest.approx(there_row, rel=RELATIVE)
    assert _figures(run.text) == _figures(done.stdout)


def test_the_policy_is_a_model_that_transformers_loads(downloaded: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(downloaded / "policy")
    assert sum(p.numel() for p in model.parameters()) > 100_000


def test_a_second_download_copies_nothing(here: RealCluster, downloaded: Path) -> None:
    done = here.dpo_ray("kubernetes", "download", NAME, "--namespace", here.namespace, "--to", "cluster")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()
    assert all(line.endswith("is there already") for line in done.stdout.splitlines())


def test_the_list_shows_it_as_done(here: RealCluster, downloaded: Path) -> None:
    done = here.dpo_ray("kubernetes", "list", "--namespace", here.namespace, "--json")
    [listed] = [each for each in json.loads(done.stdout) if each["name"] == NAME]
    assert (listed["state"], listed["attempt"], listed["waits"]) == ("done", 1, "")


def test_its_log_is_on_the_storage_and_on_the_head(here: RealCluster, downloaded: Path) -> None:
    live = here.dpo_ray("kubernetes", "logs", NAME, "--namespace", here.namespace)
    stored = here.dpo_ray("kubernetes", "logs", NAME, "--namespace", here.namespace, "--attempt", "1")
    assert live.returncode == stored.returncode == 0, live.stderr + stored.stderr
    assert "policy=" in stored.stdout
    assert "policy=" in live.stdout


def test_applied_again_it_is_refused_and_replaced_it_makes_nothing_again(here: RealCluster, downloaded: Path) -> None:
    arguments = ("kubernetes", "apply", RECIPE, *here.overrides(NAME))
    refused = here.dpo_ray(*arguments)
    assert refused.returncode != 0
    assert "already exists" in refused.stderr
    again = here.start(*arguments, "--replace", "--wait")
    assert again.end(300) == 0
    assert "train: started" not in again.text


def test_from_deletion_to_the_last_pod_gone_less_than_20_s_pass(here: RealCluster, downloaded: Path) -> None:
    assert here.pods(NAME)
    done = here.dpo_ray("kubernetes", "delete", NAME, "--namespace", here.namespace)
    assert done.returncode == 0, done.stderr
    took = re.search(r"deleted, with its pods, in ([\d.]+) s", done.stdout)
    assert took is not None, done.stdout
    assert float(took[1]) < 20
    assert here.pods(NAME) == []


def test_deleting_the_results_leaves_the_policy(here: RealCluster) -> None:
    """The run is gone, so that its volume is found by its recipe."""
    recipe = here.directory / "whole.yaml"
    values = dict(value.split("=", 1) for value in here.overrides(NAME))
    text = Path(RECIPE).read_text().replace("name: quickstart", f"name: {NAME}")
    profile = {key.split(".")[-1]: yaml.safe_load(v) for key, v in values.items() if key.startswith("cluster.")}
    text = text.replace("output: runs", f"output: {values['output']}")
    recipe.write_text(text + yaml.safe_dump({"cluster": {"kubernetes": profile}}))
    done = here.dpo_ray("kubernetes", "delete", str(recipe), "--results", "--yes")
    assert f"/mnt/shared/{here.namespace}/{NAME}/{NAME}: deleted" in done.stdout, done.stdout + done.stderr
    assert "artifacts, which stays" in done.stdout


def _metrics(directory: Path) -> list[dict[str, float]]:
    """Return what training measured at each step, without times."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in MEASURED if key in row} for row in rows]


def _figures(text: str) -> dict[str, str]:
    """Return the counts in the last line that a driver writes."""
    line = [line for line in text.splitlines() if " policy=" in line][-1]
    values = dict(part.split("=", 1) for part in line.split() if "=" in part)
    return {key: values[key] for key in EXACT}
