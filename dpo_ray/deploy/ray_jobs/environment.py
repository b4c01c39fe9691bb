"""Ray's runtime environment of a job: packages that the image does not have, and variables. Secrets are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dpo_ray.errors import ConfigError
from dpo_ray.run.redact import SECRET_NAME

VARIABLE = re.compile(r"^[A-Za-z_]\w*$")
LOCAL_REQUIREMENT = re.compile(r"^(-e\b|--editable\b|\.|/|file:)")
PASSWORD_IN_URL = re.compile(r"://[^/@\s:]*:[^/@\s]+@")


def runtime_environment(pip: list[str], uv: list[str], variables: list[str], judge_keys: set[str]) -> dict[str, Any]:
    """Build the runtime environment of a job, in the form that Ray expects.

    Args:
        pip, uv: requirements, or files with requirements, to install with pip or with uv.
        variables: environment variables as NAME=VALUE.
        judge_keys: names of variables with API keys of judges, which are refused as secrets.

    Raises:
        ConfigError: both installers are used, a requirement exists only on this machine, or a value looks like a secret,
            which everybody could read on the dashboard.
    """
    if pip and uv:
        raise ConfigError(
            "only one of the two installers can be used", where="--pip, --uv", fix="leave one of them out"
        )
    environment: dict[str, Any] = {}
    for installer, requirements in (("pip", pip), ("uv", uv)):
        if requirements:
            environment[installer] = [
                line for each in requirements for line in _requirements(each, f"--{installer} {each}")
            ]
    if variables:
        environment["env_vars"] = dict(_variable(each, judge_keys) for each in variables)
    return environment


def _requirements(given: str, where: str) -> list[str]:
    lines = [given]
    if Path(given).is_file():
        try:
            lines = Path(given).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the file cannot be read: {error}", where=where, fix="name a requirements file"
            ) from None
    requirements = [line.split(" #")[0].strip() for line in lines]
    requirements = [line for line in requirements if line and not line.startswith("#")]
    for line in requirements:
        if LOCAL_REQUIREMENT.match(line) or (line.endswith((".txt", ".whl")) and "://" not in line):
            fix = "use a package of an index or a URL; upload your own code with --working-dir"
            raise ConfigError(f"`{line}` exists only on this machine", where=where, fix=fix)
        if PASSWORD_IN_URL.search(line):
            fix = "give the cluster's nodes access to the index: the image's pip.conf, or a proxy"
            raise ConfigError("the URL contains a password, and the dashboard shows it", where=where, fix=fix)
    return requirements


def _variable(given: str, judge_keys: set[str]) -> tuple[str, str]:
    name, sign, value = given.partition("=")
    if not sign or not VARIABLE.match(name):
        raise ConfigError(
            "this is not NAME=VALUE", where=f"--env {given}", fix="for example --env NCCL_SOCKET_IFNAME=eth0"
        )
    if name in judge_keys or SECRET_NAME.search(name):
        fix = f"set {name} where the cluster's nodes start (the image, the pod's Secret, the shell of `ray start`)"
        raise ConfigError(
            "this looks like a secret, and the dashboard shows such values", where=f"--env {name}=...", fix=fix
        )
    if PASSWORD_IN_URL.search(value):
        fix = f"set {name} where the cluster's nodes start"
        raise ConfigError("the URL contains a password, and the dashboard shows it", where=f"--env {name}=...", fix=fix)
    return name, value
