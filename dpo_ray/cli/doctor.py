"""The command that checks this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from .options import Json, console


def doctor(
    output: Annotated[
        str, typer.Option(help="A directory or URI; the command checks that runs can be written to it.")
    ] = "runs",
    as_json: Json = False,
) -> None:
    """Check versions, devices, Ray and storage. Show what will not work, and how to fix it."""
    from .machine_checks import examine  # imports torch

    checks = examine(output)
    broken = any(check.state == "broken" for check in checks)
    if as_json:
        typer.echo(json.dumps([vars(check) for check in checks]))
    else:
        table = Table("", "what", "found", "how to fix it")
        for check in checks:
            mark = {"ok": "[green]ok[/green]", "warning": "[yellow]look[/yellow]", "broken": "[red]broken[/red]"}[
                check.state
            ]
            table.add_row(mark, check.what, check.found, check.fix)
        console().print(table)
    raise typer.Exit(9 if broken else 0)
