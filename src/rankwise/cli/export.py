"""`rankwise export`: a checkpoint, a run or any plain LoRA folder as a verified serving adapter."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import AsJson, Quiet

__all__ = ["command"]


def command(
    source: Annotated[Path, typer.Argument(help="A checkpoint, a run's folder or a PEFT LoRA folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    layout: Annotated[
        str | None, typer.Option(help="uniform (every server), compact, per_rank, or merged (full weights).")
    ] = None,
    consumer: Annotated[
        str | None,
        typer.Option("--for", help="peft, vllm, sglang, tgi, gguf, ollama, mlx or merged: picks the layout that fits."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default float32, for merged weights that of the base."),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(
            "--max-rank", help="Re-compress layers of more ranks; tells what that discards.", show_default=False
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base", help="Base model for merged weights or a check of the logits.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a verified serving adapter.

    It serves with the same numbers everywhere: the file is read back and compared before it is put in place.
    """
    from rankwise.cli import render
    from rankwise.cli.progress import Drawing, output_console
    from rankwise.workflows.export import export

    with Drawing(quiet=quiet or as_json) as draw:
        report = export(
            source,
            output,
            draw,
            layout=layout,
            consumer=consumer,
            dtype=dtype,
            max_rank=max_rank,
            base_model=base_model,
            overwrite=overwrite,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        output_console().print(render.export_view(report.to_dict()))
