"""What a run has produced on the volume, its report and its policy, and copying that to this machine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from dpo_ray.errors import ConfigError, InfrastructureError, WriteRefusedError
from dpo_ray.observe.text import size

from . import stored_files
from .client import Cluster
from .files_pod import RunVolume, shell
from .transfer import PART, LocalFile, file_hash, remote_hash

LIST = 'cd "$1" && find . -maxdepth "$2" -type f | sort'
DEPTH_OF_A_POLICY = 8
POLICY = re.compile(r"\bpolicy=(/\S+)")  # in the last line that a driver writes


def result_files(cluster: Cluster, volume: RunVolume, pod: str, target: Path) -> list[LocalFile]:
    """List the files of a run's directory itself, such as the report, and those of its policy, with their places here.

    Raises:
        ConfigError: the run has no directory, or its last attempt has not written a policy.
        InfrastructureError: the volume cannot be read.
    """
    own = _listed(cluster, volume, pod, volume.directory, 1)
    files = [LocalFile(target / name, f"{volume.directory}/{name}") for name in own if not name.startswith("lease-")]
    policy = policy_of(cluster, volume, pod)
    inside = _listed(cluster, volume, pod, policy, DEPTH_OF_A_POLICY)
    return files + [LocalFile(target / "policy" / name, f"{policy}/{name}") for name in inside]


def policy_of(cluster: Cluster, volume: RunVolume, pod: str) -> str:
    """Return the directory of the policy, which the driver of the last attempt named in its last line.

    Raises:
        ConfigError: no attempt has ended with a policy.
    """
    found = stored_files.logs(cluster, volume, pod)
    log = f"{volume.directory}/logs/attempt-{max(found)}/{stored_files.DRIVER_LOG}"
    text = b"".join(stored_files.content(cluster, volume, pod, log)).decode(errors="replace")
    policies = POLICY.findall(text)
    if not policies:
        fix = "download again when `dpo-ray kubernetes list` says that the run is done"
        raise ConfigError("the run's last attempt has not ended with a policy", where=volume.directory, fix=fix)
    return policies[-1]


def download(
    cluster: Cluster,
    volume: RunVolume,
    pod: str,
    file: LocalFile,
    say: Callable[[str], None],
    *,
    overwrite: bool = False,
) -> str:
    """Copy one file from the volume, resuming what an earlier download left; return what was done, in words.

    Raises:
        WriteRefusedError: there is another file here, and `overwrite` is False.
        InfrastructureError: the volume cannot be read, or what arrived differs.
    """
    expected = remote_hash(cluster, volume, pod, file.remote)
    if file.local.exists():
        if file_hash(file.local) == expected:
            return "is there already"
        if not overwrite:
            fix = "--overwrite replaces it, --to chooses another directory"
            raise WriteRefusedError("there is another file of this name", where=str(file.local), fix=fix)
    part = file.local.with_name(file.local.name + PART)
    part.parent.mkdir(parents=True, exist_ok=True)
    first = part.stat().st_size if part.exists() else 0
    if first:
        say(f"{file.remote}: goes on after {size(first)}")
    with part.open("ab") as output:
        for piece in stored_files.content(cluster, volume, pod, file.remote, first):
            output.write(piece)
    if file_hash(part) != expected:
        part.unlink()
        fix = "repeat the command; a file that a run still writes differs each time"
        raise InfrastructureError("what arrived differs from the file on the volume", where=file.remote, fix=fix)
    shutil.move(part, file.local)
    return f"{size(file.local.stat().st_size)} copied and compared"


def _listed(cluster: Cluster, volume: RunVolume, pod: str, directory: str, depth: int) -> list[str]:
    done = shell(cluster, volume, pod, LIST, directory, str(depth))
    if done.code is None:
        raise InfrastructureError(f"the volume cannot be read: {done.errors}", where=directory, fix="try again")
    if done.code != 0:
        raise ConfigError("there is no such directory", where=directory, fix="has the run started?")
    return [line.removeprefix("./") for line in done.output.decode(errors="replace").splitlines()]
