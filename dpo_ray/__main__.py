"""Run the command line as `python -m dpo_ray`, which does the same as the command `dpo-ray`."""

from dpo_ray.cli.app import main

main()
