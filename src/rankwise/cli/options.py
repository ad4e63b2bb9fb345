"""Options that several verbs share, said once."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AsJson", "ConfigFile", "Quiet", "Settings"]

ConfigFile = Annotated[Path, typer.Argument(help="The run file (YAML).", metavar="RUN.yaml", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the run file; may be repeated.", metavar="KEY.SUB=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and the result.")]
