"""Draws a workflow's events on stderr: bars with rate and time left in a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from rankwise.cli import render
from rankwise.report.words import duration
from rankwise.workflows.events import (
    CostReady,
    Event,
    Metrics,
    Note,
    PhaseDone,
    PhaseProgress,
    PhaseStarted,
    PlanReady,
    Result,
)

__all__ = ["Drawing", "error_console", "output_console"]

_PLAIN_INTERVAL_SECONDS = 15.0
"""How often a log file hears of a phase that goes on."""


def error_console() -> Console:
    """Where people read: stderr, without wrapping surprises in log files."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())


def output_console() -> Console:
    """Where results go: stdout."""
    return Console(file=sys.stdout, highlight=False)


class _RateColumn(ProgressColumn):
    """Units a second, with the phase's own unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = str(task.fields.get("unit", ""))
        if not speed or not unit:
            return Text("")
        slow = speed < 1.0
        figure = f"{1 / speed:.1f} s/{unit}" if slow else f"{speed:.1f} {unit}/s"
        return Text(figure, style="cyan")


class _CountColumn(ProgressColumn):
    """Units done of all units; nothing for a phase without units."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}", style="green")


class _TimeColumn(ProgressColumn):
    """How long it has taken and, where that can be known, how long it will take."""

    def render(self, task: Task) -> Text:
        spent = f"{duration(round(task.elapsed or 0.0, 1))} elapsed"
        left = task.time_remaining if task.total is not None else None
        return Text(spent if left is None else f"{spent}, {duration(left)} left", style="yellow")


class Drawing:
    """A listener that draws; use it as a context manager around the workflow.

    Args:
        quiet: draw warnings only.
        draw_plan: draw the plan when it is ready; not where the plan is the result.
    """

    def __init__(self, *, quiet: bool = False, draw_plan: bool = True) -> None:
        self.console = error_console()
        self._quiet = quiet
        self._draw_plan = draw_plan
        self._live = self.console.is_terminal and not quiet
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._titles: dict[str, PhaseStarted] = {}
        self._spoken: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bars()

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        match event:
            case PhaseStarted():
                self._started(event)
            case PhaseProgress():
                self._progressed(event)
            case PhaseDone():
                self._done(event)
            case Note():
                self._note(event)
            case PlanReady():
                if self._draw_plan:
                    self._above_bars(render.plan_summary(event.plan))
            case Metrics():
                self._metrics(event)
            case CostReady():
                pass  # the verb that asked shows it with the plan
            case Result():
                self._stop_bars()

    def _above_bars(self, *renderables: object) -> None:
        if not self._quiet:
            self.console.print(*renderables)

    def _bars(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=None if self.console.width > 100 else 20),
                _CountColumn(),
                _RateColumn(),
                _TimeColumn(),
                TextColumn("{task.fields[detail]}", style="dim"),
                console=self.console,
                transient=True,
            )
            self._progress.start()
        return self._progress

    def _stop_bars(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()

    def _started(self, event: PhaseStarted) -> None:
        self._titles[event.phase] = event
        self._spoken[event.phase] = time.monotonic()
        if self._live:
            bars = self._bars()
            self._tasks[event.phase] = bars.add_task(
                event.title, total=event.total, completed=event.done, unit=event.unit, detail=""
            )
        else:
            size = f" ({event.total} {_plural(event.unit, event.total)})" if event.total and event.unit else ""
            self._above_bars(f"{event.title}{size} ...")

    def _progressed(self, event: PhaseProgress) -> None:
        if self._live and event.phase in self._tasks:
            bar = self._tasks[event.phase]
            if event.total is not None:
                self._bars().update(bar, total=event.total)
            self._bars().update(bar, completed=event.done, detail=event.detail)
            return
        now = time.monotonic()
        if now - self._spoken.get(event.phase, 0.0) >= _PLAIN_INTERVAL_SECONDS:
            self._spoken[event.phase] = now
            started = self._titles.get(event.phase)
            title = started.title if started else event.phase
            total = event.total or (started.total if started else None)
            self._above_bars(f"{title}: {event.done}{f'/{total}' if total else ''} {event.detail}".rstrip())

    def _done(self, event: PhaseDone) -> None:
        started = self._titles.get(event.phase)
        title = started.title if started else event.phase
        if self._live and event.phase in self._tasks:
            self._bars().remove_task(self._tasks.pop(event.phase))
        detail = f", {event.detail}" if event.detail else ""
        line = Text.assemble(("done ", "green"), f"{title} ", (f"{event.seconds:.1f} s{detail}", "dim"))
        self._above_bars(line)

    def _note(self, event: Note) -> None:
        if event.level == "warning":
            self.console.print(Text.assemble(("warning ", "yellow"), event.text))
        else:
            self._above_bars(Text.assemble(("note ", "blue"), event.text))

    def _metrics(self, event: Metrics) -> None:
        values = event.values
        if any(key.startswith("eval_") for key in values):
            figures = ", ".join(
                f"{key.removeprefix('eval_').replace('_', ' ')} {value:.4g}"
                for key, value in values.items()
                if key in ("eval_loss", "eval_accuracy")
            )
            self._above_bars(Text.assemble(("eval ", "magenta"), f"step {values.get('step', '?')}: {figures}"))


def _plural(unit: str, count: int) -> str:
    if count == 1:
        return unit
    return f"{unit}es" if unit.endswith("ch") else f"{unit}s"
