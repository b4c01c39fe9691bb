"""Memory limits as the kernel shows them, and the error of workers that were killed at such a limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError

from dpo_ray.cluster.cgroup import MemoryLimit, memory_limit
from dpo_ray.cluster.memory_losses import NodeMemory, lack_of_memory, memory_error

POD = NodeMemory("n1", "10.0.0.5", "pod lab/aligned-training-x", "training", 8 << 30, 2)


def control_groups(root: Path, own: str, **files: str) -> tuple[Path, Path]:
    for name, text in files.items():
        file = root / "cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (root / "own").write_text(own)
    return root / "cgroup", root / "own"


def test_a_container_of_version_2_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    files = {
        "memory_DOT_max": "8589934592\n",
        "memory_DOT_events": "low 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 1\n",
    }
    assert memory_limit(*control_groups(tmp_path, "0::/\n", **files)) == MemoryLimit(8 << 30, 2)


def test_the_nearest_limit_around_a_process_counts(tmp_path: Path) -> None:
    files = {
        "user__memory_DOT_max": "1000",
        "user__memory_DOT_events": "oom_kill 4",
        "user__job__memory_DOT_max": "max",
    }
    assert memory_limit(*control_groups(tmp_path, "0::/user/job\n", **files)) == MemoryLimit(1000, 4)


def test_a_container_of_version_1_whose_own_path_is_that_of_the_host(tmp_path: Path) -> None:
    files = {"memory__memory_DOT_limit_in_bytes": "4096", "memory__memory_DOT_oom_control": "under_oom 0\noom_kill 1\n"}
    own = "4:cpu,cpuacct:/kubepods/x\n3:memory:/kubepods/x\n0::/kubepods/x\n"
    assert memory_limit(*control_groups(tmp_path, own, **files)) == MemoryLimit(4096, 1)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", ""])
def test_no_limit_is_none(tmp_path: Path, limit: str) -> None:
    files = {"memory_DOT_max": limit, "memory__memory_DOT_limit_in_bytes": limit}
    assert memory_limit(*control_groups(tmp_path, "0::/\n", **files)) is None
    assert memory_limit(tmp_path / "none", tmp_path / "none") is None


def test_the_error_names_the_pod_its_limit_and_the_field() -> None:
    error = memory_error("training workers", "train", [POD], by_ray=False)
    assert error.what == (
        "the kernel has killed training workers for lack of memory on pod lab/aligned-training-x (limit: 8.0 GiB)"
    )
    assert error.where == "cluster.kubernetes.training.memory_gib"
    assert error.fix.startswith("raise this field and apply the recipe again, or lower train.tokens_per_micro_batch")
    assert error.is_final


def test_engines_on_training_pods_name_the_field_of_those_pods() -> None:
    assert memory_error("engines", "reference", [POD], by_ray=True).where == "cluster.kubernetes.training.memory_gib"
    assert memory_error("engines", "reference", [], by_ray=True).where == "cluster.kubernetes.engines.memory_gib"


def test_on_a_machine_without_pods_the_role_is_named() -> None:
    machine = NodeMemory("n1", "10.0.0.5", "machine host", "", None, 1)
    error = memory_error("engines", "reference", [machine], by_ray=False)
    assert error.where == "cluster.roles.reference"
    assert "on machine host" in error.what
    assert "limit" not in error.what


def test_other_errors_are_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_ray.cluster.memory_losses.on_each_node", lambda *_, **__: pytest.fail("Ray is asked"))
    assert lack_of_memory("training workers", "train", ValueError("a shape")) is None


@pytest.mark.parametrize("kills", [0, 1])
def test_ray_names_its_own_kills_and_the_kernels_are_counted(monkeypatch: pytest.MonkeyPatch, kills: int) -> None:
    nodes = [POD, NodeMemory("n2", "10.0.0.6", "pod lab/aligned-training-y", "training", 8 << 30, kills)]
    monkeypatch.setattr("dpo_ray.cluster.memory_losses.on_each_node", lambda *_, **__: nodes)
    monkeypatch.setattr("dpo_ray.cluster.memory_losses._known_kills", {"n1": 2})
    by_kernel = lack_of_memory("engines", "reference", "Worker unexpectedly exits with a connection error code 2")
    assert (by_kernel is not None) == bool(kills)
    assert by_kernel is None or ("the kernel" in by_kernel.what and "training-y" in by_kernel.what)
    words = "Task was killed due to the node running low on memory. Memory on the node (IP: 10.0.0.6, ID: 5)"
    by_ray = lack_of_memory("engines", "reference", OutOfMemoryError(words))
    assert by_ray is not None
    assert "Ray, shortly before the limit, has killed engines" in by_ray.what
    assert "training-y" in by_ray.what
    assert "training-x" not in by_ray.what
