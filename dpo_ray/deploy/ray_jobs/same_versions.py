"""Before a submitted run begins: is this cluster's dpo-ray the one that checked the recipe?

python -m dpo_ray.deploy.ray_jobs.same_versions dpo-ray==0.1.0
"""

from __future__ import annotations

import sys

from dpo_ray import __version__
from dpo_ray.errors import InfrastructureError


def check(submitted_by: str) -> None:
    """Compare minor versions with `dpo-ray==VERSION`, what the recipe was submitted by.

    Raises:
        InfrastructureError: they differ, so recipes may mean something else here.
    """
    theirs = submitted_by.removeprefix("dpo-ray==")
    if theirs.split(".")[:2] != __version__.split(".")[:2]:
        raise InfrastructureError(
            f"this cluster has dpo-ray {__version__}, and dpo-ray {theirs} submitted the run",
            where="versions",
            fix=f"submit with dpo-ray {__version__}, or use an image with dpo-ray {theirs}",
        )


if __name__ == "__main__":
    try:
        check(sys.argv[1])
    except InfrastructureError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)
