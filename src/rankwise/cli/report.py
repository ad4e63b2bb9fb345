"""`rankwise report`: write a run's HTML report again."""

from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import AsJson

__all__ = ["command"]


def command(
    run: Annotated[Path, typer.Argument(help="The run's output folder.")],
    as_json: AsJson = False,
) -> None:
    """Write a run's HTML report again.

    From the files of a run, finished or not; prints where it is.
    """
    import json

    from rankwise.report.report import write_report

    path = write_report(run)
    typer.echo(json.dumps({"report": str(path)}) if as_json else str(path))
