"""`rankwise plan`: see what a run would spend and where, before paying for it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import AsJson, ConfigFile, Quiet, Settings

__all__ = ["command"]


def command(
    config: ConfigFile,
    settings: Settings = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan as editable JSON.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show each layer's rank and why; train nothing.

    Also the parameter budget and what the run will cost.
    """
    from rankwise.cli.progress import Drawing, output_console
    from rankwise.errors import OutputError

    if output is not None:
        from rankwise.export.staging import refuse_unwritable

        refuse_unwritable(output.absolute().parent, "--output")
        if output.exists():
            raise OutputError(f"{output} exists: plans are not overwritten; remove it or name another file")
    from rankwise.workflows.config import load_config
    from rankwise.workflows.events import CostReady, Event
    from rankwise.workflows.plan import plan

    run = load_config(config, settings or [])
    cost: dict[str, float | int] = {}
    with Drawing(quiet=quiet or as_json, draw_plan=False) as draw:

        def listen(event: Event) -> None:
            if isinstance(event, CostReady):
                cost.update(event.cost)
            draw(event)

        made = plan(run, listen)
    if output is not None:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        made.save(output)
        draw.console.print(f"wrote {output}; edit the ranks and train with: rankwise train {config} --plan {output}")
    if as_json:
        typer.echo(json.dumps({"plan": json.loads(made.to_json()), "cost": cost}, indent=2))
    else:
        from rankwise.cli import render

        output_console().print(render.plan_view(made), render.cost_view(cost))
