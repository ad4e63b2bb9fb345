"""What a workflow tells whoever listens; the command line draws it, a library user may ignore it.

Every event is a plain frozen value. A workflow never prints.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rankwise.ranks.plan import RankPlan

__all__ = [
    "CostReady",
    "Event",
    "Listener",
    "Metrics",
    "Note",
    "PhaseDone",
    "PhaseProgress",
    "PhaseStarted",
    "PlanReady",
    "Result",
    "ignore",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseStarted:
    """A phase began: loading, data, calibration, training, evaluation, export, report.

    Args:
        phase: a short stable word.
        title: what to show.
        total: how many units it has, None if unknown (then it is a spinner).
        unit: what one unit is ("batch", "step", "row").
        done: units already done (a continued run).
    """

    phase: str
    title: str
    total: int | None = None
    unit: str = ""
    done: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseProgress:
    """`done` of the phase's units are done; `detail` is a few words beside the bar ("loss 1.234")."""

    phase: str
    done: int
    total: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseDone:
    """A phase ended after `seconds`."""

    phase: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that the user should know: rows dropped, a list entry that matched nothing, a file written."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReady:
    """The rank plan is final."""

    plan: RankPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReady:
    """What the plan will cost on this machine, as `RunCost.to_dict()` says it."""

    cost: Mapping[str, float | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """One logging event of training or evaluation, as written to metrics.jsonl."""

    values: Mapping[str, float | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The run ended well: the output folder, the figures of the manifest's `result`, and the report."""

    folder: Path
    figures: Mapping[str, object] = field(default_factory=dict)
    report: Path | None = None


Event = PhaseStarted | PhaseProgress | PhaseDone | Note | PlanReady | CostReady | Metrics | Result
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of whoever does not listen."""
