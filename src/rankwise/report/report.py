"""Writes a run's report: one HTML file that needs nothing else, from the files that the run left."""

import os
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from rankwise.report.files import Run, read_run
from rankwise.report.view import page
from rankwise.report.words import figure, plain

__all__ = ["render_report", "write_report"]


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into a run's folder, whether the run finished, failed, was interrupted or is going on.

    Equal files give equal bytes: nothing of the moment of writing enters. The file is never seen half-written.

    Args:
        run_folder: the output folder with rankwise.json, plan.json, metrics.jsonl, ranks.jsonl and health.json.

    Returns:
        The path of the report.

    Raises:
        ArtifactError: a file that the run must have is missing, or one is damaged; the message names it.
    """
    folder = Path(run_folder)
    text = render_report(read_run(folder))
    target = folder / "report.html"
    staged = folder / f".report.html.{os.getpid()}.part"
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)
    return target


def render_report(run: Run) -> str:
    """The report as HTML text.

    Args:
        run: the files of a run.
    """
    environment = Environment(
        loader=PackageLoader("rankwise.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    environment.filters["plain"] = plain
    environment.filters["yaml"] = lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return environment.get_template("report.html").render(page(run))
