"""Bars and lines of the report as inline SVG: no script, no outside resource, colors from the page's style sheet.

Colors are classes (`q0` to `q8` for a scale, `c0` to `c7` for kinds): one picture reads in a light and in a dark page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

from rankwise.report.svg import frame, level, node, thin, ticks
from rankwise.report.words import figure, shortened

__all__ = ["KIND_COLORS", "Line", "Picture", "importance_bars", "line_chart", "stacked_bar"]

KIND_COLORS = 8
"""Colors that tell kinds apart; the last one stands for the rest."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart with its caption."""

    caption: str
    chart: Markup


def importance_bars(identity: str, title: str, bars: Sequence[tuple[str, float, int]]) -> Markup:
    """The most important layers as bars with their ranks beside them.

    Args:
        identity: unique in the page.
        title: what the picture is.
        bars: label, importance (>= 0, finite) and rank, the most important first.
    """
    top = max([importance for _, importance, _ in bars] + [1e-300])
    low, high = min(rank for *_, rank in bars), max(rank for *_, rank in bars)
    shapes: list[Markup] = []
    for place, (label, importance, rank) in enumerate(bars):
        y = place * 24.0
        width = max(1.0, 190 * importance / top)
        color = f"q{max(2, level(rank, low, high))}"
        shapes += [
            node(
                "text",
                shortened(label, 28),
                node("title", label),
                x=196,
                y=y + 16,
                text_anchor="end",
                class_="mono small",
            ),
            node(
                "rect",
                node("title", f"{label}: {figure(importance)}"),
                x=204,
                y=y + 4,
                width=width,
                height=16,
                rx=2,
                class_=color,
            ),
            node("text", f"rank {rank}", x=204 + width + 6, y=y + 16, class_="soft small"),
        ]
    description = "; ".join(
        f"{label}: importance {figure(importance)}, rank {rank}" for label, importance, rank in bars
    )
    return frame(identity, title, description, 480, len(bars) * 24.0 + 2, *shapes)


@dataclass(frozen=True, slots=True)
class Line:
    """One series over optimizer steps: a line, or marks for what is measured now and then."""

    label: str
    points: Sequence[tuple[float, float]]
    kind: Literal["line", "marks"] = "line"
    color: int = 0


_WIDTH, _HEIGHT = 480.0, 252.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 24.0, 28.0, 36.0


@dataclass(frozen=True, slots=True)
class _Axes:
    """The map from data to the drawing, with its ticks."""

    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]
    x_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)


def line_chart(identity: str, title: str, lines: Sequence[Line]) -> Markup:
    """Series over optimizer steps; readings that are not finite are marked at the upper edge, not left out in silence.

    Args:
        identity: unique in the page.
        title: what the picture is.
        lines: the series; at least one point in all.
    """
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    steps = [x for line in lines for x, _ in line.points]
    heights = [y for _, y in finite] or [0.0]
    low_x, high_x = min(steps), max(steps)
    margin = 0.5 if low_x == high_x else 0.0
    y_ticks = ticks(min(heights), max(heights))
    x_ticks = tuple(tick for tick in ticks(low_x, high_x, 5) if low_x <= tick <= high_x and tick == int(tick))
    axes = _Axes(x_ticks, y_ticks, (low_x - margin, high_x + margin))
    shapes = [*_grid_lines(axes), *_legend(lines)]
    for line in lines:
        shapes += _series(line, axes)
    return frame(identity, title, _in_words(lines), _WIDTH, _HEIGHT, *shapes)


def _grid_lines(axes: _Axes) -> list[Markup]:
    shapes = []
    for tick in axes.y_ticks:
        y = axes.y(tick)
        shapes += [
            node("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"),
            node("text", figure(round(tick, 12), 3), x=_LEFT - 8, y=y + 4, text_anchor="end", class_="soft"),
        ]
    for tick in axes.x_ticks:
        shapes.append(
            node("text", figure(tick), x=axes.x(tick), y=_HEIGHT - _BOTTOM + 18, text_anchor="middle", class_="soft")
        )
    shapes.append(node("text", "step", x=_WIDTH - _RIGHT, y=_HEIGHT - 4, text_anchor="end", class_="soft small"))
    return shapes


def _legend(lines: Sequence[Line]) -> list[Markup]:
    shapes, x = [], _LEFT
    for line in lines:
        shapes += [
            node("circle", cx=x + 5, cy=12, r=4.5, class_=f"c{line.color}"),
            node("text", line.label, x=x + 15, y=16, class_="soft"),
        ]
        x += 30 + 7 * len(line.label)
    return shapes


def _series(line: Line, axes: _Axes) -> list[Markup]:
    good = [(x, y) for x, y in line.points if math.isfinite(y)]
    places = [(axes.x(x), axes.y(y)) for x, y in (thin(good) if line.kind == "line" else good)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    shapes = [node("path", d=path, class_=f"{line.kind} l{line.color}")] if len(places) > 1 else []
    if line.kind == "marks" or len(places) == 1:
        shapes += [
            node(
                "circle",
                node("title", f"step {figure(x)}: {figure(y)}"),
                cx=axes.x(x),
                cy=axes.y(y),
                r=4,
                class_=f"c{line.color}",
            )
            for x, y in good
        ]
    for x, y in line.points:
        if not math.isfinite(y):
            mark = f"M{axes.x(x) - 5:.1f} {_TOP - 2:.1f}l10 0l-5 9z"
            shapes.append(node("path", node("title", f"step {figure(x)}: {y}"), d=mark, class_="bad"))
    return shapes


def _in_words(lines: Sequence[Line]) -> str:
    sentences = []
    for line in lines:
        if not line.points:
            continue
        (first_step, first), (last_step, last) = line.points[0], line.points[-1]
        broken = sum(not math.isfinite(y) for _, y in line.points)
        sentence = f"{line.label}: {figure(first)} at step {figure(first_step)}"
        if len(line.points) > 1:
            sentence += f", {figure(last)} at step {figure(last_step)}"
        sentences.append(sentence + (f", {broken} reading{'s' if broken > 1 else ''} not finite." if broken else "."))
    return " ".join(sentences)


def stacked_bar(identity: str, title: str, parts: Sequence[tuple[str, float]], total: float) -> Markup:
    """What fills a total: one colored piece a part, in order; what is left stays empty.

    Args:
        identity: unique in the page.
        title: what the picture is.
        parts: label and amount (>= 0).
        total: the whole width.
    """
    whole = max(total, sum(amount for _, amount in parts)) or 1.0
    edges = [0.0]
    for _, amount in parts:
        edges.append(edges[-1] + 1000 * amount / whole)
    shapes = [
        node(
            "rect",
            node("title", f"{label}: {figure(amount)}"),
            x=start,
            y=0,
            width=max(0.0, end - start - (1.5 if end - start > 4 else 0)),
            height=28,
            class_=f"c{min(place, KIND_COLORS - 1)}",
        )
        for place, ((label, amount), (start, end)) in enumerate(zip(parts, pairwise(edges), strict=True))
    ]
    description = "; ".join(f"{label} {figure(amount)} ({amount / whole:.1%})" for label, amount in parts)
    return frame(identity, title, description, 1000, 28, *shapes, style="height:28px;width:100%", stretch=True)
