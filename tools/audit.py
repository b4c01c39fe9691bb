"""Look the locked packages up in PyPI's database of known vulnerabilities: `python tools/audit.py`.

pip-audit does the work, in an environment of its own. Where the database cannot be reached, the audit is skipped with
a word and the exit code is 0, because a machine without a network must be able to run all checks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from installing.lock import LOCKS, find_uv

PIP_AUDIT = "pip-audit==2.10.1"
TIMEOUT_SECONDS = 600
ACCEPTED: dict[str, str] = {}  # the id of a vulnerability, and why it does not concern this project


def main() -> int:
    """Audit the versions for both engines; return 1 if one of them has a vulnerability that is not accepted."""
    uv = find_uv()
    found = [finding(audited(uv, LOCKS / f"{engine}.txt"), engine) for engine in ("cpu", "gpu")]
    return max(found)


def audited(uv: str, lock: Path) -> dict[str, Any] | str:
    """Return pip-audit's report on a lock file, or why there is none."""
    audit = ["pip-audit", "--requirement", str(lock), "--disable-pip", "--require-hashes", "--format", "json"]
    command = [uv, "tool", "run", "--from", PIP_AUDIT, *audit, "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"no answer in {TIMEOUT_SECONDS} s"
    try:
        return json.loads(done.stdout)
    except ValueError:
        return next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")


def finding(report: dict[str, Any] | str, engine: str) -> int:
    """Print one line for each vulnerability, and one line in the end; return the exit code."""
    if isinstance(report, str):
        print(f"audit of {engine}: skipped, because pip-audit gave no report: {report}")
        return 0
    packages = report.get("dependencies", [])
    looked_up = [package for package in packages if "vulns" in package]
    if not looked_up:
        print(f"audit of {engine}: skipped, because the database has none of the {len(packages)} packages")
        return 0
    open_ones = 0
    for package in looked_up:
        for vulnerability in package["vulns"]:
            reason = ACCEPTED.get(vulnerability["id"])
            open_ones += reason is None
            mended = ", ".join(vulnerability.get("fix_versions") or []) or "none"
            accepted = f"; accepted: {reason}" if reason else ""
            print(f"{package['name']} {package['version']}: {vulnerability['id']}; mended in: {mended}{accepted}")
    print(f"audit of {engine}: {len(looked_up)} of {len(packages)} packages looked up, {open_ones} vulnerabilities")
    return 1 if open_ones else 0


if __name__ == "__main__":
    sys.exit(main())
