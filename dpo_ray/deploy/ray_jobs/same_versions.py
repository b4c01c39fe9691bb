"""A check before a submitted run starts: the cluster must have the same dpo-ray version as the machine that submitted it.

python -m dpo_ray.deploy.ray_jobs.same_versions dpo-ray==0.1.0
"""

from __future__ import annotations

import sys

from dpo_ray import __version__
from dpo_ray.errors import InfrastructureError


def check(submitted_by: str) -> None:
    """Compare this cluster's version with `dpo-ray==VERSION`, the version that submitted the recipe.

    Raises:
        InfrastructureError: the major or minor versions differ, so a recipe may have another meaning here.
    """
    theirs = submitted_by.removeprefix("dpo-ray==")
    if theirs.split(".")[:2] != __version__.split(".")[:2]:
        raise InfrastructureError(
            f"this cluster has dpo-ray {__version__}, but the run was submitted by dpo-ray {theirs}",
            where="versions",
            fix=f"submit with dpo-ray {__version__}, or use an image with dpo-ray {theirs}",
        )


if __name__ == "__main__":
    try:
        check(sys.argv[1])
    except InfrastructureError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)
