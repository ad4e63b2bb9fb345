"""The command `rankwise`: one verb a file; this one holds the app and the exit codes.

0 done; 1 the run failed (an unforeseen fault shows its trace); 2 a fault found before the first step; 3 a health check
failed after it began; 130 interrupted. Nothing here or at the top of a verb's file imports torch: help answers at once.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from rankwise.cli import check, demo, export, methods, plan, report, train
from rankwise.errors import ConfigError, RankwiseError

__all__ = ["app", "main"]

app = typer.Typer(
    name="rankwise",
    help="Spend a LoRA budget where it pays: train with published low-rank methods, leave one plain, verified adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich draws our results; for help its import alone would cost the time of the answer
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (demo, plan, train, export, check, report, methods):
    app.command(name=verb.__name__.rpartition(".")[2])(verb.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed_version

        sys.stdout.write(f"rankwise {installed_version('rankwise')}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Spend a LoRA budget where it pays: train with published low-rank methods, leave one plain, verified adapter."""


def _with_optional_values(arguments: Sequence[str]) -> list[str]:
    """`--resume` may stand alone: it then means the last complete checkpoint."""
    words = list(arguments)
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else "-"
        if word == "--resume" and (following.startswith("-") or following.endswith((".yaml", ".yml"))):
            words[index] = "--resume=latest"
    return words


def _report_error(error: RankwiseError, as_json: bool) -> None:
    faults = list(error.faults) if isinstance(error, ConfigError) else [str(error)]
    if as_json:
        body = {"error": {"kind": type(error).__name__, "exit_code": error.exit_code, "faults": faults}}
        sys.stdout.write(json.dumps(body) + "\n")
    if len(faults) == 1:
        sys.stderr.write(f"error: {faults[0]}\n")
        return
    sys.stderr.write(f"error: {len(faults)} faults\n")
    for fault in faults:
        sys.stderr.write(f"  - {fault}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line and leave with its exit code."""
    # Read by OpenMP when torch loads it: on a busy machine two spinning threads are many times slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = _with_optional_values(sys.argv[1:] if arguments is None else arguments)
    try:
        app(words, prog_name="rankwise")
    except RankwiseError as error:
        _report_error(error, "--json" in words)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
