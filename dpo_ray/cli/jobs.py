"""The commands that run a recipe on an existing Ray cluster: submit, status, logs, stop, list."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dpo_ray.observe.text import duration

from .options import Json

if TYPE_CHECKING:
    from dpo_ray.deploy.ray_jobs.jobs import Job

Address = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar="DPO_RAY_ADDRESS",
        help="Address of the cluster's dashboard: http://HEAD:8265. RAY_ADDRESS is not used.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as printed by `submit` and `list`.")]


def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    address: Address,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Values that override those of the recipe.")
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also upload this directory of code, except the files that its .gitignore and .rayignore name.",
        ),
    ] = None,
    pip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REQ|FILE",
            help="Install this requirement, or this file of requirements, in addition to the packages of the image.",
        ),
    ] = None,
    uv: Annotated[
        list[str] | None, typer.Option(metavar="REQ|FILE", help="The same as --pip, but installed by uv.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Set an environment variable; the dashboard shows its value."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job, and exit with its own exit code.")] = False,
) -> None:
    """Submit a recipe to a running Ray cluster, where it runs independently of this machine.

    After a failure, a stop or the loss of the cluster, submit the recipe again: the run continues from the committed work.
    Every node must be able to access the paths in the recipe. Data, models and secrets are never uploaded.
    """
    from dpo_ray.config.load import load_recipe
    from dpo_ray.deploy.ray_jobs import submit as submission
    from dpo_ray.deploy.ray_jobs.environment import runtime_environment

    loaded = load_recipe(recipe, overrides or [])
    keys = loaded.online.judge_environment() if loaded.online is not None else set()
    environment = runtime_environment(pip or [], uv or [], env or [], keys)
    client = _client(address)
    sent = submission.submit(client, loaded, environment, working_dir)
    for key in sorted(keys):
        typer.echo(f"{key}: the API key of a judge; it must be set in the environment of the cluster's nodes", err=True)
    if "env_vars" in environment:
        names = ", ".join(environment["env_vars"])
        typer.echo(f"{names}: everybody who can open the cluster's dashboard can read these values", err=True)
    typer.echo(f"submitted {sent.id}: {', '.join(sent.files)}")
    if wait:
        _follow(client, sent.id, address)
    for command in (f"logs {sent.id} -f", f"status {sent.id}", f"stop {sent.id}"):
        typer.echo(f"  dpo-ray {command} --address {shlex.quote(address)}")


def status(job: JobId, address: Address, as_json: Json = False) -> None:
    """Show the state of a job. If the job has ended, also show what to do next."""
    from dpo_ray.deploy.ray_jobs.jobs import look

    state = look(_client(address), job)
    typer.echo(json.dumps(_values(state)) if as_json else f"{state.id}: {state.words}{_times(state)}")


def logs(
    job: JobId,
    address: Address,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the output until the job ends, and exit with its exit code.")
    ] = False,
) -> None:
    """Print the log of a job, that is, the output of its driver."""
    from dpo_ray.deploy.ray_jobs.logs import printed

    client = _client(address)
    if follow:
        _follow(client, job, address)
    typer.echo(printed(client, job), nl=False)


def stop(
    job: JobId,
    address: Address,
    grace_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="Time to finish the step and write a checkpoint; 0: stop at once, without a checkpoint."
        ),
    ] = 600,
) -> None:
    """Stop a job after it has written a checkpoint. If the recipe is submitted again, the run continues from there."""
    from dpo_ray.deploy.ray_jobs import jobs as known

    ended = known.stop(_client(address), job, grace_seconds, typer.echo)
    typer.echo(f"{ended.id}: {ended.words}{_times(ended)}")


def list_jobs(address: Address, as_json: Json = False) -> None:
    """List the runs that were submitted to a cluster, the newest first."""
    from dpo_ray.deploy.ray_jobs.jobs import every

    submitted = every(_client(address))
    if as_json:
        typer.echo(json.dumps([_values(job) for job in submitted]))
        return
    if not submitted:
        typer.echo("no run has been submitted to this cluster since it started")
        return
    table = Table()
    for name in ("job", "state", "started", "duration", "output"):
        table.add_column(name, no_wrap=name != "state")
    for job in submitted:
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else ""
        table.add_row(job.id, job.words, begun, _duration(job), job.output)
    Console(width=None if sys.stdout.isatty() else 200).print(table, markup=False)


def _client(address: str) -> Any:
    from dpo_ray.deploy.ray_jobs.server import connect

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # they log uploads and connections
    return connect(address)


def _follow(client: Any, job: str, address: str) -> None:
    """Print a job's log until the job ends, and exit with its exit code. Ctrl-C ends only the printing, not the job."""
    from dpo_ray.deploy.ray_jobs.logs import follow

    try:
        ended = follow(client, job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        again = f"dpo-ray logs {job} -f --address {shlex.quote(address)}"
        typer.echo(f"\n{job} is still running; to follow it again: {again}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{ended.id}: {ended.words}{_times(ended)}", err=True)
    raise typer.Exit(ended.code)


def _values(job: Job) -> dict[str, Any]:
    return {**vars(job), "state": job.words, "code": job.code if job.is_over else None}


def _times(job: Job) -> str:
    return f" ({_duration(job)})" if job.started else ""


def _duration(job: Job) -> str:
    """Return as text how long a job ran or has been running; "" if it has not started."""
    if job.started is None:
        return ""
    return duration((job.ended or time.time()) - job.started)
