"""The entry point of the command line: it registers all commands, prints errors, and sets the exit code."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from typing import Any

import typer
from rich.console import Console

from dpo_ray.errors import EXIT_CODES, DpoRayError, RayLostError, StoppedError
from dpo_ray.observe.ray_output import discard_ray_output, ray_output
from dpo_ray.observe.text import harmless

from .artifacts import artifacts
from .doctor import doctor
from .inspect import inspect
from .jobs import list_jobs, logs, status, stop, submit
from .kubernetes import kubernetes
from .plan import plan
from .recipe import init, schema, validate
from .rounds import rounds
from .run import report, run
from .store import store

_MEANINGS = EXIT_CODES | {1: "A bug in dpo-ray itself: the traceback shows where"}
_CODES = "\n".join(f"* {code}: {meaning.rstrip('.')}" for code, meaning in sorted(_MEANINGS.items()))
OVERRIDE_AS_OPTION = re.compile(r"No such option:? (?:--)?-*([a-z_]+(?:\.[a-z_]+)+)")
app = typer.Typer(
    help="Align a language model with preference data (DPO and its family), on Ray.\n\nA recipe is a YAML file. Every value in it can be "
    "overridden on the command line as key.path=value. Begin with `dpo-ray init` and `dpo-ray run`.",
    epilog="Exit codes:\n\n" + _CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (run, rounds, plan, validate, schema, init, report, doctor, submit, status, logs, stop):
    app.command()(command)
app.command("list")(list_jobs)
app.add_typer(inspect, name="inspect")
app.add_typer(store, name="store")
app.add_typer(artifacts, name="artifacts")
app.add_typer(kubernetes, name="kubernetes")


def _print_error(text: str) -> None:
    """Print an error in red. Its text may quote file names and data, so control characters in it are replaced."""
    if (path := ray_output()) is not None:
        print(f"what Ray itself printed is in {path}", file=sys.stderr)
    else:
        discard_ray_output()
    lines = "\n".join(harmless(line) for line in f"error: {text}".split("\n"))
    Console(stderr=True, soft_wrap=True).print(lines, style="red", highlight=False, markup=False)


def main(arguments: list[str] | None = None) -> None:
    """Run a command of the command line, and exit with its exit code. Print errors of dpo-ray without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Ray reads this when it is imported. Otherwise a call after a session's end would start another Ray, and wait for it.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        code: Any = app(arguments, standalone_mode=False, prog_name="dpo-ray")
    except DpoRayError as error:
        _print_error(str(error))
        if isinstance(error, RayLostError):  # when Python exits, Ray would wait for its lost process
            sys.stdout.flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except SystemExit as stopped:
        if (
            stopped.code != signal.SIGTERM
        ):  # Ray exits with it on SIGTERM; during training SIGTERM raises a StoppedError instead
            raise
        Console(stderr=True).print("stopped; the same command goes on from what was committed", style="yellow")
        sys.exit(StoppedError.exit_code)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from what was committed", style="yellow")
        sys.exit(130)
    except typer.TyperException as error:
        if message := error.format_message():  # empty if the help was printed because there were no arguments
            override = OVERRIDE_AS_OPTION.search(message)
            _print_error(f"{message} A value of a recipe has no dashes: {override[1]}=VALUE" if override else message)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
