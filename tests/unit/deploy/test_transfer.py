"""Copying what a recipe names onto the volume: the places, resuming, comparing, and what is never overwritten."""

import pytest
from typer.testing import CliRunner

pytest.importorskip("kubernetes", reason="the extra `kubernetes` is not installed")

from dpo_ray.cli.kubernetes import kubernetes
from dpo_ray.config.load import load_recipe
from dpo_ray.deploy.kubernetes.client import Cluster
from dpo_ray.deploy.kubernetes.files_pod import volume_of_recipe
from dpo_ray.deploy.kubernetes.transfer import PART, LocalFile, select_files, upload
from dpo_ray.errors import ConfigError, InfrastructureError, WriteRefusedError
from tests.helpers.kubernetes import pod
from tests.helpers.manifests import PIPELINES

RECIPE = """
name: mine
model: {path: ./models/sft}
data: {train: ["data/train-*.jsonl"], eval: data/eval.jsonl}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return a directory with a recipe, its data and its model."""
    work = tmp_path / "work"
    for file in ("models/sft/config.json", "models/sft/sub/weights", "data/train-1.jsonl", "data/train-2.jsonl"):
        (work / file).parent.mkdir(parents=True, exist_ok=True)
        (work / file).write_text(file * 20)
    (work / "data/eval.jsonl").write_text("{}\n")
    (work / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def volume(server, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_ray.deploy.kubernetes.transfer.FIRST_PAUSE_SECONDS", 0.01)
    server.pod_root = tmp_path / "volume"
    server.pod_root.mkdir()
    server.objects["Pod", "files"] = pod("files", "files")
    return server.pod_root


def test_relative_paths_patterns_and_directories_have_their_places(here):
    found = select_files(load_recipe(here / "recipe.yaml", []), "/mnt/shared")
    assert {str(f.local): f.remote for f in found.files} == {
        "models/sft/config.json": "/mnt/shared/models/sft/config.json",
        "models/sft/sub/weights": "/mnt/shared/models/sft/sub/weights",
        "data/train-1.jsonl": "/mnt/shared/data/train-1.jsonl",
        "data/train-2.jsonl": "/mnt/shared/data/train-2.jsonl",
        "data/eval.jsonl": "/mnt/shared/data/eval.jsonl",
    }
    assert found.left == []


def test_what_is_elsewhere_is_said_and_what_is_missing_refused(here):
    changes = ["model.path=/mnt/shared/models/x", "data.eval=/data/eval.jsonl", "data.train=s3://bucket/train.jsonl"]
    found = select_files(load_recipe(here / "recipe.yaml", changes), "/mnt/shared")
    assert found.files == []
    assert [line.split(": ")[1].split(",")[0] for line in found.left] == [
        "not on this machine; it must be on the volume already",
        "not on the volume",
    ]
    with pytest.raises(ConfigError, match="no such file or directory here"):
        select_files(load_recipe(here / "recipe.yaml", ["data.eval=data/none.jsonl"]), "/mnt/shared")
    assert select_files(load_recipe(PIPELINES / "quickstart.yaml", []), "/mnt/shared") == ([], [])


def test_files_arrive_whole_and_a_second_time_nothing_is_sent(here, volume, server):
    arguments = ["upload", "recipe.yaml"]
    result = CliRunner().invoke(kubernetes, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    for file in ("models/sft/sub/weights", "data/train-2.jsonl"):
        assert (volume / file).read_bytes() == (here / file).read_bytes()
    assert not list(volume.rglob(f"*{PART}"))
    again = CliRunner().invoke(kubernetes, arguments, catch_exceptions=False)
    assert again.stdout.count("is there already") == 5
    assert "copied" not in again.stdout
    assert [key for key in server.objects if key[0] == "Pod"] == [("Pod", "files")]


def test_an_unfinished_upload_goes_on_and_a_damaged_one_begins_again(here, volume, monkeypatch):
    monkeypatch.setattr("dpo_ray.deploy.kubernetes.transfer.PIECE_BYTES", 100)
    cluster, target = Cluster(), volume_of_recipe(load_recipe(here / "recipe.yaml", []))
    file = LocalFile(here / "data/train-1.jsonl", "/mnt/shared/data/train-1.jsonl")
    content, told = file.local.read_bytes(), []
    (volume / "data").mkdir()
    (volume / f"data/train-1.jsonl{PART}").write_bytes(content[:150])
    upload(cluster, target, "files", file, told.append)
    assert told == ["/mnt/shared/data/train-1.jsonl: goes on after 150 B"]
    assert (volume / "data/train-1.jsonl").read_bytes() == content
    other = file._replace(remote="/mnt/shared/other.jsonl")
    (volume / f"other.jsonl{PART}").write_bytes(b"x" * 150)
    upload(cluster, target, "files", other, told.append)
    assert len(told) == 1
    assert (volume / "other.jsonl").read_bytes() == content


def test_another_file_of_the_name_is_overwritten_only_by_request(here, volume, server):
    cluster, target = Cluster(), volume_of_recipe(load_recipe(here / "recipe.yaml", []))
    file = LocalFile(here / "data/eval.jsonl", "/mnt/shared/data/eval.jsonl")
    (volume / "data").mkdir()
    (volume / "data/eval.jsonl").write_text("[]\n")  # of the same size
    with pytest.raises(WriteRefusedError, match="another file of this name"):
        upload(cluster, target, "files", file, print)
    assert (volume / "data/eval.jsonl").read_text() == "[]\n"
    upload(cluster, target, "files", file, print, overwrite=True)
    assert (volume / "data/eval.jsonl").read_text() == "{}\n"
    server.forbidden = {"exec"}
    with pytest.raises(InfrastructureError, match="403"):
        upload(cluster, target, "files", file, print)


def test_apply_names_the_files_that_are_not_on_the_volume_and_starts_nothing(here, volume, server):
    server.objects["PersistentVolumeClaim", "dpo-ray"] = {"metadata": {"name": "dpo-ray"}}
    CliRunner().invoke(kubernetes, ["upload", "recipe.yaml"], catch_exceptions=False)
    (volume / "data/train-1.jsonl").unlink()  # the pattern still names another one
    (volume / "data/eval.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"a file that the volume does not have:\n    data\.eval") as refused:
        CliRunner().invoke(kubernetes, ["apply", "recipe.yaml"], catch_exceptions=False)
    assert "upload RECIPE" in refused.value.fix
    assert ("RayJob", "mine") not in server.objects
    CliRunner().invoke(kubernetes, ["upload", "recipe.yaml"], catch_exceptions=False)
    applied = CliRunner().invoke(kubernetes, ["apply", "recipe.yaml"], catch_exceptions=False)
    assert applied.exit_code == 0
    assert ("RayJob", "mine") in server.objects


def test_a_claim_that_is_not_there_is_named_or_made(here, volume, server):
    with pytest.raises(ConfigError, match="no such PersistentVolumeClaim"):
        CliRunner().invoke(kubernetes, ["apply", "recipe.yaml"], catch_exceptions=False)
    new = "cluster.kubernetes.storage={create_gib: 1}"
    with pytest.raises(ConfigError, match="names 3 files that the volume does not have"):
        CliRunner().invoke(kubernetes, ["apply", "recipe.yaml", new], catch_exceptions=False)
    assert ("RayJob", "mine") not in server.objects
    uploaded = CliRunner().invoke(kubernetes, ["upload", "recipe.yaml", new], catch_exceptions=False)
    assert "PersistentVolumeClaim/dpo-ray: applied" in uploaded.stdout
    applied = CliRunner().invoke(kubernetes, ["apply", "recipe.yaml", new], catch_exceptions=False)
    assert applied.exit_code == 0


def test_who_may_not_start_a_pod_is_told_that_nothing_was_checked(here, volume, server):
    server.objects["PersistentVolumeClaim", "dpo-ray"] = {"metadata": {"name": "dpo-ray"}}
    server.forbidden = {"exec"}
    applied = CliRunner().invoke(kubernetes, ["apply", "recipe.yaml"], catch_exceptions=False)
    assert applied.exit_code == 0
    assert "was not checked: the volume cannot be read" in applied.stderr
    assert ("RayJob", "mine") in server.objects
