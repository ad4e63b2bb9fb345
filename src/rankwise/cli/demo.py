"""`rankwise demo`: the whole main job on real input, in a minute or two on a laptop."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import AsJson, Quiet

__all__ = ["command"]


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the run goes.")] = Path("runs/demo"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also the head alone and plain LoRA at the same budget and steps.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again even if a finished demo is there.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole main job on real input.

    Fine-tunes MiniLM with GoRA on 45 WordNet supersenses, exports, verifies and reports.
    """
    from rankwise.cli import render
    from rankwise.cli.progress import Drawing, output_console
    from rankwise.workflows.demo import demo

    with Drawing(quiet=quiet or as_json) as draw:
        result = demo(draw, folder=output, compare=compare, fresh=fresh)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        output_console().print(render.demo_view(result.to_dict()))
