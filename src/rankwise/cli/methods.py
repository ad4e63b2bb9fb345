"""`rankwise methods`: what there is to choose from."""

import json
from typing import Annotated

import typer

from rankwise.cli.options import AsJson

__all__ = ["command"]


def command(
    method: Annotated[str | None, typer.Argument(help="One method, for its settings.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or show one.

    Slots, source, settings with defaults, presets, learning rates.
    """
    from rankwise.workflows.methods import describe_method, describe_methods

    body = describe_methods() if method is None else describe_method(method)
    if as_json:
        typer.echo(json.dumps(body, indent=2, default=str))
        return
    from rankwise.cli import render
    from rankwise.cli.progress import output_console

    view = render.methods_view(body) if isinstance(body, list) else render.method_view(body)
    output_console().print(view)
