"""`rankwise check`: which software would compute something else from an adapter, and the command that mends it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import AsJson

__all__ = ["command"]


def command(
    folder: Annotated[Path, typer.Argument(help="Any PEFT LoRA folder.")],
    as_json: AsJson = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if any consumer would be wrong or refuse.")
    ] = False,
) -> None:
    """Audit any PEFT LoRA folder.

    Says who mis-scales it, by how much, and which command mends it; needs no base model.
    """
    from rankwise.export.audit import check_folder

    audit = check_folder(folder)
    if as_json:
        typer.echo(json.dumps(audit.to_dict(), indent=2))
    else:
        from rankwise.cli import render
        from rankwise.cli.progress import output_console

        output_console().print(render.audit_view(audit.to_dict()))
    if strict and not audit.served_alike:
        raise typer.Exit(3)
