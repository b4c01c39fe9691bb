"""The command that checks this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from dpo_ray.errors import InfrastructureError

from .options import Json, console


def doctor(
    output: Annotated[
        str, typer.Option(help="A directory or URI; the command checks that runs can be written to it.")
    ] = "runs",
    as_json: Json = False,
) -> None:
    """Check versions, devices, Ray and storage. Show what will not work, and how to fix it."""
    try:
        from .machine_checks import examine  # imports torch
    except (ImportError, OSError) as error:
        raise _cannot_import(error) from None
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


def _cannot_import(error: Exception) -> InfrastructureError:
    """Build the error for a machine on which not even torch can be imported, so that nothing else can be checked."""
    from dpo_ray.reference.native_libraries import how_to_fix, library_faults, what_is_wrong

    faults = library_faults()
    what = what_is_wrong(faults) if faults else f"a package cannot be imported: {error}"
    return InfrastructureError(what, where="torch", fix=how_to_fix(faults) if faults else "make install")
