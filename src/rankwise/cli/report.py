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

    From the files of a run, finished or not; says what became of its ranks, and prints where the report is.
    """
    import json

    from rankwise.report.files import read_run
    from rankwise.report.report import write_report
    from rankwise.report.summary import live_totals

    path = write_report(run)
    files = read_run(run)
    if as_json:
        totals = {
            name.replace(" ", "_"): {"start": start, "end": end} for name, (start, end) in live_totals(files).items()
        }
        typer.echo(json.dumps({"report": str(path), "events": len(files.events), **totals}))
        return
    from rankwise.cli import render
    from rankwise.cli.progress import error_console

    error_console().print(render.course_view(files))
    typer.echo(str(path))
