"""What a job's processes find: packages that the cluster's image lacks, and plain variables. Secrets never travel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dpo_ray.errors import ConfigError

SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PG?PASS(WORD|WD|PHRASE)?|CREDENTIALS?|CONNECTION_STRING|\w*KEY)(_|$)", re.IGNORECASE
)
VARIABLE = re.compile(r"^[A-Za-z_]\w*$")
LOCAL_REQUIREMENT = re.compile(r"^(-e\b|--editable\b|\.|/|file:)")
PASSWORD_IN_URL = re.compile(r"://[^/@\s:]*:[^/@\s]+@")


def runtime_environment(pip: list[str], uv: list[str], variables: list[str], judge_keys: set[str]) -> dict[str, Any]:
    """Write Ray's runtime environment. Each of `pip` and `uv` is a requirement or a file of them; variables are NAME=VALUE.

    Raises:
        ConfigError: both installers, a requirement that only this machine has, or a secret where all can read it.
    """
    if pip and uv:
        raise ConfigError("one installer or the other", where="--pip, --uv", fix="leave one of them out")
    made: dict[str, Any] = {}
    for installer, given in (("pip", pip), ("uv", uv)):
        if given:
            made[installer] = [line for each in given for line in _requirements(each, f"--{installer} {each}")]
    if variables:
        made["env_vars"] = dict(_variable(each, judge_keys) for each in variables)
    return made


def _requirements(given: str, where: str) -> list[str]:
    lines = [given]
    if Path(given).is_file():
        try:
            lines = Path(given).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read: {error}", where=where, fix="name a requirements file") from None
    wanted = [line.split(" #")[0].strip() for line in lines]
    wanted = [line for line in wanted if line and not line.startswith("#")]
    for line in wanted:
        if LOCAL_REQUIREMENT.match(line) or (line.endswith((".txt", ".whl")) and "://" not in line):
            fix = "name a package of an index or a URL; code of your own goes with --working-dir"
            raise ConfigError(f"`{line}` is on this machine only", where=where, fix=fix)
        if PASSWORD_IN_URL.search(line):
            fix = "give the cluster's nodes access to the index: the image's pip.conf, or a proxy"
            raise ConfigError("a URL with a password in it, which the dashboard shows", where=where, fix=fix)
    return wanted


def _variable(given: str, judge_keys: set[str]) -> tuple[str, str]:
    name, sign, value = given.partition("=")
    if not sign or not VARIABLE.match(name):
        raise ConfigError(
            "this is not NAME=VALUE", where=f"--env {given}", fix="for example --env NCCL_SOCKET_IFNAME=eth0"
        )
    if name in judge_keys or SECRET_NAME.search(name):
        fix = f"set {name} where the cluster's nodes start (the image, the pod's Secret, the shell of `ray start`)"
        raise ConfigError(
            "looks like a secret, and the dashboard shows such values", where=f"--env {name}=...", fix=fix
        )
    if PASSWORD_IN_URL.search(value):
        fix = f"set {name} where the cluster's nodes start"
        raise ConfigError("a URL with a password in it, which the dashboard shows", where=f"--env {name}=...", fix=fix)
    return name, value
