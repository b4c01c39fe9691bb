"""A recipe on a cluster of three nodes gives what it gives on this machine alone, bit for bit, and each role is where it is told.

HH_DATA and HH_MODEL say where real data and a small model are (defaults beside the repository); they are not part of the project.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.util.state import list_actors, list_nodes

from tests.helpers.local_cluster import REPOSITORY, LocalCluster, local_cluster

DATA = Path(os.environ.get("HH_DATA", REPOSITORY.parent / "shared" / "data" / "hh-harmless")).resolve()
MODEL = Path(os.environ.get("HH_MODEL", REPOSITORY.parent / "shared" / "models" / "llama-6m")).resolve()
pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]
ROLES = (
    "cluster.roles={prepare: {node_labels: {dpo/role: head}}, reference: {node_labels: {dpo/role: reference}}, "
    "train: {node_labels: {dpo/role: train}}}"
)
PLACES = {"Engine": "reference", "RayTrainWorker": "train"}
SHORTER = (
    "data.train=[{type: synthetic, pairs: 128}]",
    "data.eval=[{type: synthetic, pairs: 32, seed: 1}]",
    "train.steps=4",
    "evaluate.sample_prompts=8",
)
HH = (
    f"model.path={MODEL}",
    f"data.train={DATA}/train-*.jsonl.gz",
    f"data.eval={DATA}/eval-*.jsonl.gz",
)
RUNS = [
    pytest.param("quickstart", SHORTER, (), id="quickstart"),
    pytest.param("quickstart", (), (), id="quickstart-in-full", marks=pytest.mark.long),
    pytest.param(
        "quickstart",
        SHORTER,
        ("--namespaces",),
        id="quickstart-in-namespaces",
        marks=[
            pytest.mark.long,
            pytest.mark.skipif(
                os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
            ),
        ],
    ),
    pytest.param(
        "hh_rlhf",
        HH,
        (),
        id="hh-in-full",
        marks=[
            pytest.mark.long,
            pytest.mark.skipif(
                not (DATA.is_dir() and MODEL.is_dir()), reason=f"no HH-RLHF data in {DATA}, or no model in {MODEL}"
            ),
        ],
    ),
]


def artifacts(output: Path) -> dict[str, dict[str, Any]]:
    """Read the manifest of every stage's artifact."""
    found = (json.loads(path.read_text()) for path in (output / "artifacts").glob("*/manifest.json"))
    return {manifest["stage"]: manifest for manifest in found if manifest["stage"] != "shard"}


def digests(manifest: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, str]:
    return {entry["name"]: entry["sha256"] for entry in manifest["files"] if not entry["name"].endswith(without)}


def curve(output: Path) -> list[tuple[float, float]]:
    """Read the loss and the gradient's norm of every step."""
    (metrics,) = (output / "artifacts").glob("train-*/metrics.jsonl")
    rows = map(json.loads, metrics.read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in rows]


def places(cluster: LocalCluster) -> dict[str, set[str]]:
    """Return the roles of the nodes on which the actors of each class ran."""
    roles = {node.node_id: node.labels["dpo/role"] for node in list_nodes(cluster.url, detail=True)}
    found: dict[str, set[str]] = {}
    for actor in list_actors(cluster.url, detail=True):
        found.setdefault(actor.class_name, set()).add(roles[actor.node_id])
    return found


@pytest.mark.parametrize(("name", "overrides", "options"), RUNS)
def test_three_nodes_give_what_one_machine_gives(
    tmp_path: Path, name: str, overrides: tuple[str, ...], options: tuple[str, ...]
) -> None:
    recipe = str(REPOSITORY / "pipelines" / f"{name}.yaml")
    arguments = [recipe, *overrides, "train.workers=2", ROLES]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DPO_RAY_"))}
    here = [sys.executable, "-m", "dpo_ray", "run", *arguments, f"output={tmp_path / 'here'}"]
    subprocess.run(here, env=environment, check=True, capture_output=True, timeout=1200)
    subnet = "10.231.8" if options else None
    with local_cluster(tmp_path, "--nodes", "3", *options, subnet=subnet) as cluster:
        code, out, err = cluster.call("submit", *arguments, f"output={tmp_path / 'there'}", "--wait")
        assert code == 0, out + err
        where = places(cluster)
    assert {kind: where[kind] for kind in PLACES} == {kind: {role} for kind, role in PLACES.items()}
    mine, theirs = artifacts(tmp_path / "here"), artifacts(tmp_path / "there")
    assert mine.keys() == theirs.keys() == {"prepare", "reference", "schedule", "train", "evaluate"}
    for stage in ("prepare", "schedule"):
        assert digests(mine[stage]) == digests(theirs[stage])
    timed = ("metrics.jsonl", "policy/README.md")  # they have seconds and gibibytes
    assert digests(mine["train"], timed) == digests(theirs["train"], timed)
    assert curve(tmp_path / "here") == curve(tmp_path / "there")
    assert mine["evaluate"]["figures"] == theirs["evaluate"]["figures"]
