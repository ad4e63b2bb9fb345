"""`rankwise train`: from a run file to a verified adapter."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import AsJson, ConfigFile, Quiet, Settings

__all__ = ["command"]


def command(
    config: ConfigFile,
    settings: Settings = None,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Use this rank plan instead of allocating.", metavar="FILE", show_default=False),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            help="Insist on continuing; alone, from the last complete checkpoint, else from the one named.",
            metavar="[CHECKPOINT]",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Plan, train, verify and export.

    The same command again continues a run that was cut short.
    """
    from rankwise.workflows.config import load_config

    run = load_config(config, settings or [])
    from rankwise.cli import render
    from rankwise.cli.progress import Drawing, output_console
    from rankwise.workflows.train import train

    start = None if resume is None else (True if resume == "latest" else Path(resume))
    with Drawing(quiet=quiet or as_json) as draw:
        result = train(run, draw, resume=start or False, plan_file=plan_file)
    if as_json:
        body = {"folder": str(result.folder), "report": str(result.report), "result": dict(result.figures)}
        typer.echo(json.dumps(body, indent=2, default=str))
    else:
        output_console().print(render.result_view(result.folder, result.figures, result.report))
