"""How the ranks moved: the ranks before, during and after as small pictures, and what drove them as curves.

A moment shown in between is one at which an equal part of all that moved had moved, so that a quiet warm-up takes no
picture.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from rankwise.report.charts import Line, Picture, line_chart
from rankwise.report.files import RankEvent, Run
from rankwise.report.grid import Panel, arrange, headings
from rankwise.report.small_map import SMALL_WIDTH, small_map
from rankwise.report.words import figure

__all__ = ["Gallery", "Moment", "course_gallery", "driving_curves", "maps_of", "moments", "spread"]

_BETWEEN = 4
"""Moments shown between the first and the last."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures on one color scale, with what its ends are; `low` is empty where there is no scale."""

    identity: str
    title: str
    sentence: str
    pictures: Sequence[Picture]
    low: str = ""
    high: str = ""
    width: int = SMALL_WIDTH


@dataclass(frozen=True, slots=True)
class Moment:
    """The ranks after every event up to a step; 0 before the first."""

    step: int
    ranks: Mapping[str, int]


def moments(run: Run, between: int = _BETWEEN) -> tuple[Moment, ...]:
    """The start, at most `between` moments of the run, and the ranks after the last change; empty if none moved.

    Args:
        run: the files of a run.
        between: how many moments in between.
    """
    ranks = dict(run.start_ranks)
    found, moved, so_far = [Moment(0, dict(ranks))], [0], 0
    for event in run.events:
        changes = [line for line in event.moved if line.layer in ranks]
        if not changes:
            continue
        ranks |= {line.layer: line.to for line in changes}
        so_far += sum(abs(line.to - line.from_) for line in changes)
        if found[-1].step == event.step and len(found) > 1:
            found.pop()
            moved.pop()
        found.append(Moment(event.step, dict(ranks)))
        moved.append(so_far)
    if len(found) == 1:
        return ()
    inner = range(1, len(found) - 1)
    chosen: Iterable[int] = inner
    if len(inner) > between:
        parts = [so_far * part / (between + 1) for part in range(1, between + 1)]
        chosen = dict.fromkeys(next((at for at in inner if moved[at] >= part), inner[-1]) for part in parts)
    return (found[0], *(found[at] for at in chosen), found[-1])


def spread(values: Sequence[RankEvent], limit: int) -> Sequence[RankEvent]:
    """At most `limit` (>= 2) of the values, evenly apart, the first and the last among them."""
    if len(values) <= limit:
        return values
    return [values[round(place * (len(values) - 1) / (limit - 1))] for place in range(limit)]


def course_gallery(run: Run) -> Gallery | None:
    """The ranks at the start, at a few moments and at the end; None if no rank moved."""
    found = moments(run)
    if run.plan is None or not found:
        return None
    every = [rank for moment in found for rank in moment.ranks.values()]
    scale = (float(min(every)), float(max(every)))
    panels = arrange(run.plan.ranks)
    pictures = []
    for place, moment in enumerate(found):
        before = found[place - 1].ranks if place else moment.ranks
        turns = {name: rank - before[name] for name, rank in moment.ranks.items()}
        hints = {name: _hint(name, rank, turns[name]) for name, rank in moment.ranks.items()}
        when = _when(run, found, place)
        chart = maps_of(
            f"course-{place}",
            f"Ranks {when}",
            panels,
            dict(moment.ranks),
            scale=scale,
            text=figure,
            hints=hints,
            turns=turns,
        )
        caption = f"{when[0].upper()}{when[1:]}: {figure(sum(moment.ranks.values()))} ranks"
        pictures.append(Picture(caption, chart))
    sentence = (
        "The same picture at the start, at moments in between and after the last change, all on one color scale. "
        "A triangle marks what rose or fell since the picture before it (in narrow cells only where few did); "
        "an outlined cell has no rank."
    )
    return Gallery("course", "", sentence, pictures, figure(scale[0]), figure(scale[1]))


def _when(run: Run, found: Sequence[Moment], place: int) -> str:
    if place == 0:
        return "at the start"
    step = f"after step {figure(found[place].step)}"
    if place < len(found) - 1:
        return step
    return (
        f"at the end, since step {figure(found[place].step)}"
        if run.manifest.status == "finished"
        else f"so far, {step}"
    )


def _hint(name: str, rank: int, turn: int) -> str:
    return f"{name}: rank {rank}" + (f" ({turn:+d})" if turn else "")


def maps_of(
    identity: str, title: str, panels: Sequence[Panel], values: Mapping[str, float | None], **options: Any
) -> Markup:
    """One small map a stack, below each other.

    Args:
        identity: unique in the page.
        title: what the picture is.
        panels: the layers' places.
        values: by full layer name.
        options: those of `small_map`.
    """
    return Markup().join(
        small_map(f"{identity}-{place}", f"{title}, {panel.stack}", panel, values, heading=heading, **options)
        for place, (panel, heading) in enumerate(zip(panels, headings(panels), strict=True))
    )


@dataclass(frozen=True, slots=True)
class _Drive:
    """Where one curve comes from: a figure of the events, or of the schedule in the log (`metrics.jsonl`)."""

    name: str
    label: str
    source: Literal["events", "log"]
    color: int = 0


_DRIVES: Mapping[str, tuple[_Drive, ...]] = {
    "Share of the parameters left": (
        _Drive("sora_density", "in the log", "log"),
        _Drive("density", "at events", "events", 1),
    ),
    "Threshold of a step": (_Drive("sora_threshold", "threshold", "log", 2),),
    "Lambda": (_Drive("lambda", "threshold over learning rate", "events", 3),),
    "Score of the model in each round": (_Drive("score_model", "minus the validation loss", "events", 1),),
    "Share of the scores that is kept": (_Drive("kept_share", "at resets", "events", 2),),
    "Share of the ranks overwritten": (_Drive("pruned_share", "at resets", "events", 3),),
    "Scores of the ranks": (
        _Drive("beamlora_largest", "largest", "log"),
        _Drive("beamlora_smallest", "smallest", "log", 1),
    ),
    "Norm of each booster": (_Drive("booster_norm", "at the end of its round", "events", 1),),
}
"""What drives the ranks, by chart; one without readings is left out."""


def driving_curves(run: Run) -> list[Picture]:
    """The live ranks over steps, then what the schedule measured and steered; empty without events."""
    if not run.events:
        return []
    live = _live(run)
    charts = {"Live ranks": [live]} if len(live.points) > 2 else {}
    for title, drives in _DRIVES.items():
        lines = [
            Line(drive.label, points, "line" if drive.source == "log" else "marks", drive.color)
            for drive in drives
            if (points := _readings(run, drive))
        ]
        if lines:
            charts[title] = lines
    return [
        Picture(title, line_chart(f"drive-{place}", title, lines))
        for place, (title, lines) in enumerate(charts.items())
    ]


def _live(run: Run) -> Line:
    """All ranks that are live, as a staircase to the last step that is known."""
    total = sum(run.start_ranks.values())
    points = [(0.0, float(total))]
    for event in run.events:
        change = sum(line.to - line.from_ for line in event.moved if line.layer in run.start_ranks)
        if change:
            points += [(float(event.step), float(total)), (float(event.step), float(total + change))]
            total += change
    last = max([event.step for event in run.events] + [metric.step for metric in run.metrics])
    return Line("in all layers", [*points, (float(last), float(total))])


def _readings(run: Run, drive: _Drive) -> list[tuple[float, float]]:
    """A step that was trained again after a resume counts with its last reading."""
    if drive.source == "log":
        found = {float(metric.step): metric.more[drive.name] for metric in run.metrics if drive.name in metric.more}
    else:
        found = {
            float(event.step): event.figures[drive.name]
            for event in run.events
            if drive.name in event.figures and event.kind != "round"
        }
    return sorted(found.items())
