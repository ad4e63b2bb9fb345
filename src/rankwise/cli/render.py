"""Plain values as rich renderables: pure functions, right at any width, without color and without a terminal.

What a color says is always also said by a figure or a word.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rankwise.cli.render_plan import cost_view, frameless, plan_summary, plan_view
from rankwise.report.files import Run
from rankwise.report.summary import events_sentence, live_totals, rank_sentence
from rankwise.report.words import facts, figure, plain, with_verification

__all__ = [
    "audit_view",
    "cost_view",
    "course_view",
    "demo_view",
    "export_view",
    "health_view",
    "method_view",
    "methods_view",
    "plan_summary",
    "plan_view",
    "result_view",
]

Values = Mapping[str, object]

_TONES = {
    "passed": "green",
    "ok": "green",
    "works": "green",
    "failed": "bold red",
    "wrong": "bold red",
    "refuses": "red",
}


def health_view(health: Values) -> RenderableType:
    """The health checks of a run: what was measured, against what, and what to do where one failed.

    Args:
        health: what health.json holds.
    """
    table = frameless("check", "when", "outcome", ">measured", ">limit", "meaning")
    for check in _dicts(health.get("checks")):
        failed = check.get("status") == "failed"
        meaning = Text(str(check.get("message", "")))
        if failed and check.get("advice"):
            meaning.append(f" {check['advice']}", style="bold")
        figures = (Text(plain(check.get("measured"))), Text(plain(check.get("limit"))))
        table.add_row(
            Text(str(check.get("id", ""))),
            Text(str(check.get("stage", ""))),
            _word(check.get("status")),
            *figures,
            meaning,
        )
    return Group(Text.assemble("health checks: ", _word(health.get("status"))), table)


def verdict_table(verdicts: Sequence[Values]) -> Table:
    """What each consumer would compute from a file, and whether that is known by running it or from its source."""
    table = frameless("consumer", "version", "known by", "verdict", ">off by", "reason")
    for verdict in verdicts:
        error = verdict.get("error")
        table.add_row(
            Text(str(verdict.get("consumer", ""))),
            Text(plain(verdict.get("version"))),
            {"run": "running", "read": "source"}.get(str(verdict.get("evidence")), ""),
            _word(verdict.get("status")),
            "-" if error is None else figure(error, 2) if isinstance(error, int | float) else Text(str(error)),
            Text(str(verdict.get("reason") or "")),
        )
    return table


def audit_view(audit: Values) -> RenderableType:
    """The audit of an adapter folder: what it holds, each consumer's verdict, and the command that mends it.

    Args:
        audit: what `Audit.to_dict()` returns.
    """
    alike = "every consumer that was run computes the same" if audit.get("served_alike") else "not served alike"
    keys = ("folder", "base_model", "layers", "parameters", "dtype", "lora_alpha", "use_rslora", "vllm_max_lora_rank")
    faults = [Text(f"fault: {fault}", style="bold red") for fault in _texts(audit.get("faults"))]
    mending: list[RenderableType] = [Text(str(audit["advice"]))] if audit.get("advice") else []
    if audit.get("command"):
        mending.append(Command(str(audit["command"])))
    return Group(
        Text(alike, style="green" if audit.get("served_alike") else "bold red"),
        _fact_grid({key: audit[key] for key in keys if key in audit} | _rank_range(audit)),
        Text(),
        verdict_table(_dicts(audit.get("verdicts"))),
        *faults,
        *mending,
    )


@dataclass(frozen=True)
class Command:
    """A command line to copy: on one line, or on several joined by backslashes where the width is short.

    Args:
        text: the command, its words quoted for a shell.
    """

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The command, breaking before options only."""
        if len(self.text) + 2 <= options.max_width:
            yield Text(f"  {self.text}", style="bold")
            return
        pieces: list[list[str]] = [[]]
        for word in shlex.split(self.text):
            if word.startswith("-"):
                pieces.append([])
            pieces[-1].append(word)
        for place, piece in enumerate(pieces):
            line = ("    " if place else "  ") + shlex.join(piece) + (" \\" if place < len(pieces) - 1 else "")
            yield Text(line, style="bold", overflow="fold")


def export_view(report: Values) -> RenderableType:
    """What was exported, how exactly, and who serves it.

    Args:
        report: what `ExportReport.to_dict()` returns.
    """
    flat = with_verification(report)
    keys = (
        "folder",
        "layout",
        "dtype",
        "bytes",
        "layers",
        "update_error",
        "update_bound",
        "worst_layer",
        "logit_error",
    )
    shown = {key: flat[key] for key in (*keys, "vllm_max_lora_rank") if flat.get(key) is not None}
    verdicts = _dicts(flat.get("verdicts"))
    table: list[RenderableType] = [*_discarded(flat.get("compression"))]
    table += [Text(), verdict_table(verdicts)] if verdicts else []
    notes = [Text(f"note: {note}") for note in _texts(flat.get("notes"))]
    return Group(_fact_grid(shown | _rank_range(flat)), *table, *notes)


def _discarded(compression: object) -> list[RenderableType]:
    """What re-compression to fewer ranks lost of each layer's update, the worst first, and in all."""
    layers = compression.get("discarded") if isinstance(compression, Mapping) else None
    if not isinstance(layers, Mapping) or not layers or not isinstance(compression, Mapping):
        return []
    table = frameless(f"re-compressed to rank {compression.get('max_rank')}", ">discarded")
    for name, share in sorted(layers.items(), key=lambda item: -item[1]):
        table.add_row(Text(str(name)), Text(f"{share:.3%}"))
    table.add_row(Text("all layers together", style="bold"), Text(f"{compression.get('total'):.3%}", style="bold"))
    return [Text(), table]


def _rank_range(values: Values) -> dict[str, object]:
    """The smallest, mean and largest rank in words."""
    ranks = values.get("ranks")
    if not isinstance(ranks, list | tuple) or len(ranks) != 3:
        return {}
    low, mean, high = ranks
    return {"ranks": str(low) if low == high else f"{low} to {high}, {mean:.1f} on average"}


def result_view(folder: Path, figures: Values, report: Path | None) -> RenderableType:
    """The end of a run: its figures, and where everything is.

    Args:
        folder: the output folder.
        figures: the manifest's `result`.
        report: the HTML report, if it was written.
    """
    places = {"adapter": str(folder), "report": str(report) if report else "not written"}
    return Group(_fact_grid(dict(figures)), _fact_grid(places))


def course_view(run: Run) -> RenderableType:
    """What became of a run's ranks: the events, and the live ranks and parameters at the start and at the end.

    Args:
        run: the files of a run; one without a plan has nothing to show.
    """
    if run.plan is None:
        return Text("There is no plan yet.")
    ranks = Text(rank_sentence(run.plan, run.final_ranks))
    if not run.events:
        return Group(ranks, Text(events_sentence(run)))
    table = frameless("", ">start", ">end" if run.manifest.status == "finished" else ">so far")
    for name, totals in live_totals(run).items():
        table.add_row(name, *map(figure, totals))
    return Group(ranks, Text(events_sentence(run)), table)


def demo_view(result: Values) -> RenderableType:
    """The demo's accuracy beside the majority share, and the comparison if one was asked for.

    Args:
        result: what `DemoResult.to_dict()` returns.
    """
    rows = result.get("rows")
    between: list[RenderableType] = []
    if isinstance(rows, list | tuple) and rows:
        between = [Text(), comparison_table(rows), Text()]
    places = {key: result[key] for key in ("folder", "report") if result.get(key)}
    head = {key: value for key, value in result.items() if key in ("accuracy", "majority_share")}
    return Group(_fact_grid(head), *between, _fact_grid(places))


def comparison_table(rows: Sequence[object]) -> Table:
    """Rivals under one budget: name, accuracy, parameters, seconds.

    Args:
        rows: each a mapping with those keys or a sequence in that order; None where a figure does not apply.
    """
    keys = ("name", "accuracy", "parameters", "seconds")
    table = frameless("run", ">accuracy", ">parameters", ">time")
    for row in rows:
        named = (
            row
            if isinstance(row, Mapping)
            else dict(zip(keys, row, strict=False))
            if isinstance(row, list | tuple)
            else {}
        )
        table.add_row(Text(str(named.get("name", ""))), *(Text(plain(named.get(key), key)) for key in keys[1:]))
    return table


def methods_view(methods: Sequence[Values]) -> RenderableType:
    """The methods to choose from: id, what they change, where they come from.

    Args:
        methods: one mapping a method, as `describe_methods()` returns them.
    """
    table = frameless("method", "state", "changes", "learning rate", "title")
    for method in methods:
        slots = method.get("slots")
        changes = ", ".join(map(str, slots)) if isinstance(slots, list | tuple) else ""
        table.add_row(
            Text(str(method.get("id", "")), style="bold"),
            _word(method.get("state")),
            changes,
            Text(_rates(method)),
            Text(str(method.get("title", ""))),
        )
    hint = "Learning rates: low end, default, high end. rankwise methods ID shows one method with its settings."
    return Group(table, Text(hint, style="dim"))


def _rates(method: Values) -> str:
    """The recommended learning rates, and the optimizer that they are for."""
    rates = method.get("learning_rate")
    if not isinstance(rates, Mapping):
        return ""
    told = ", ".join(f"{rates[end]:.0e}".replace("e-0", "e-") for end in ("low", "default", "high"))
    return f"{told} ({method.get('optimizer', 'AdamW')})"


def method_view(method: Values) -> RenderableType:
    """One method: source, slots, learning rates, settings with defaults, presets.

    Args:
        method: what `describe_method(id)` returns.
    """
    settings = frameless("setting", "type", "default")
    for setting in _dicts(method.get("settings")):
        name, kind = Text(str(setting.get("name", "")), style="bold"), Text(str(setting.get("type", "")))
        settings.add_row(name, kind, Text(plain(setting.get("default"))))
    table = settings if settings.row_count else Text("It has no settings of its own.")
    rest: Values = {key: value for key, value in method.items() if key not in ("settings", "presets")}
    presets = method.get("presets")
    lines: list[RenderableType] = []
    for name, values in presets.items() if isinstance(presets, Mapping) else ():
        lines.append(Text(f"preset {name}", style="bold"))
        lines.append(Padding(_fact_grid(values if isinstance(values, Mapping) else {}), (0, 0, 0, 2)))
    return Group(_fact_grid(rest), Text(), table, *lines)


def _fact_grid(values: Values) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts(values):
        grid.add_row(Text(name), Text(text))
    return grid


def _word(value: object) -> Text:
    text = str(value or "")
    return Text(text, style=_TONES.get(text, "yellow"), no_wrap=True)


def _dicts(value: object) -> list[Values]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def _texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else []
