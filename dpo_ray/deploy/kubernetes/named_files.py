"""The files that a recipe names and a run only reads: where its pods look for them, and which are not there."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import NamedTuple

from dpo_ray.config.recipe import Recipe
from dpo_ray.deploy.shared_paths import MADE_BY_THE_RUN, named_places
from dpo_ray.errors import ConfigError, InfrastructureError

from .client import Cluster
from .execute import execute
from .files_pod import CONTAINER, RunVolume
from .recipe import path_in_pods

# Python and not the shell: a pattern may have `**`.
MISSING = """
import glob, sys
for number, path in enumerate(sys.argv[1:]):
    if not glob.glob(path, recursive=True):
        print(number)
"""
PATHS_ASKED_ABOUT = 200  # in one command, whose length the API server limits


class NamedFile(NamedTuple):
    """A path in a field of the recipe: as it is written there, and as pods see it. It may be a pattern or a directory."""

    field: str
    path: str
    remote: str

    def __str__(self) -> str:
        return f"{self.field}={self.path}"


def named_files(recipe: Recipe, mount: str) -> Iterator[NamedFile]:
    """Yield each file, pattern and directory that a recipe names. Hub names, URIs and built-in data are none of them."""
    values = recipe.model_dump(mode="json", exclude_unset=True, exclude={"cluster"})
    for section, key, field in named_places(values):
        paths = section[key] if isinstance(section[key], list) else [section[key]]
        for path in paths if field not in MADE_BY_THE_RUN else ():
            remote = path_in_pods(path, field, mount)
            if "://" not in remote and posixpath.isabs(remote):
                yield NamedFile(field, path, remote)


def on_volume(recipe: Recipe, mount: str) -> list[NamedFile]:
    """List the named files that pods look for on the shared volume."""
    return [file for file in named_files(recipe, mount) if file.remote.startswith(f"{mount}/")]


def check_present(cluster: Cluster, volume: RunVolume, pod: str, files: list[NamedFile]) -> None:
    """Check that files are on the volume.

    Raises:
        ConfigError: some are not.
        InfrastructureError: the volume cannot be read.
    """
    missing = []
    for start in range(0, len(files), PATHS_ASKED_ABOUT):
        asked = files[start : start + PATHS_ASKED_ABOUT]
        command = ["python", "-c", MISSING, *(file.remote for file in asked)]
        done = execute(cluster, volume.namespace, pod, CONTAINER, command)
        if done.code != 0:
            fix = "try again; it needs the right to `create` and `get` pods/exec"
            raise InfrastructureError(f"the volume cannot be read: {done.errors}", where=volume.mount, fix=fix)
        missing += [asked[int(number)] for number in done.output.split()]
    refuse_missing(missing)


def refuse_missing(files: list[NamedFile]) -> None:
    """Raise the error that names files which are not on the volume; without files, do nothing.

    Raises:
        ConfigError: there are such files.
    """
    if files:
        listed = "".join(f"\n    {file.field}: {file.remote}" for file in files)
        fix = "`dpo-ray kubernetes upload RECIPE` copies what is on this machine; correct the paths of what is nowhere"
        many = "a file" if len(files) == 1 else f"{len(files)} files"
        raise ConfigError(f"the recipe names {many} that the volume does not have:{listed}", where="apply", fix=fix)
