"""`python -m dpo_ray` is `dpo-ray`."""

from dpo_ray.cli.app import main

main()
