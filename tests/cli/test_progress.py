"""What people see while a workflow runs: bars in a terminal, plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from rankwise.cli import progress
from rankwise.cli.progress import Drawing
from rankwise.workflows.events import Event, Metrics, Note, PhaseDone, PhaseProgress, PhaseStarted


def drawn(monkeypatch: pytest.MonkeyPatch, events: list[Event], *, terminal: bool, quiet: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, no_color=True, highlight=False)
    monkeypatch.setattr(progress, "error_console", lambda: console)
    with Drawing(quiet=quiet) as draw:
        for event in events:
            draw(event)
            if draw._progress is not None:
                draw._progress.refresh()
    return out.getvalue()


RUN: list[Event] = [
    PhaseStarted(phase="data", title="Reading data"),
    PhaseDone(phase="data", seconds=1.0, detail="8 rows"),
    PhaseStarted(phase="training", title="Training", total=4, unit="step"),
    PhaseProgress(phase="training", done=1, detail="loss 2.5"),
    PhaseProgress(phase="training", done=2, detail="loss 1.5"),
    Metrics(values={"step": 2, "eval_loss": 1.25, "eval_accuracy": 0.5}),
    PhaseDone(phase="training", seconds=2.0),
    Note(text="mind this", level="warning"),
]


def test_a_log_file_gets_plain_lines_without_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, RUN, terminal=False)
    assert "Reading data ..." in text
    assert "Training (4 steps) ..." in text
    assert "done Training 2.0 s" in text
    assert "eval step 2: loss 1.25, accuracy 0.5" in text
    assert "━" not in text
    assert "\x1b" not in text


def test_a_phase_without_units_shows_no_count_and_no_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, RUN[:1], terminal=True)
    assert "elapsed" in text
    assert "/?" not in text
    assert " left" not in text


def test_a_phase_with_units_shows_its_count_and_detail(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, RUN[2:5], terminal=True)
    assert "2/4" in text
    assert "loss 1.5" in text


def test_quiet_leaves_warnings_alone_standing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, RUN, terminal=False, quiet=True)
    assert text.split() == ["warning", "mind", "this"]
