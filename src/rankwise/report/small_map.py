"""Small heat maps that stand side by side: one stack of layers, depth from left to right, nothing but cells.

Where a cell changed since the picture before, a small triangle says which way, so that it is seen without color. Narrow
cells have no room for it where many of them changed: the color says enough there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from rankwise.report.grid import Panel
from rankwise.report.svg import frame, level, node
from rankwise.report.words import shortened

__all__ = ["SMALL_WIDTH", "small_map"]

SMALL_WIDTH = 330
"""The width of a drawing whose cells have room in it."""
_LINE, _GAP = 17.0, 1.5
_LETTER = 6.8
_LABEL_LENGTH, _HEADING_LENGTH = 18, 44
_NARROW = 12.0
"""Cells below this width have an unbroken outline, and triangles only where few changed."""


def small_map(
    identity: str,
    title: str,
    panel: Panel,
    values: Mapping[str, float | None],
    *,
    scale: tuple[float, float],
    text: Callable[[float], str],
    hints: Mapping[str, str],
    turns: Mapping[str, int] | None = None,
    heading: str = "",
    width: float = SMALL_WIDTH,
) -> Markup:
    """Values of one stack of layers, one cell a layer.

    Args:
        identity: unique in the page.
        title: what the picture is.
        panel: the layers' places.
        values: by full layer name; None or a missing one leaves the cell empty.
        scale: the ends of the color scale, shared by all pictures of a row.
        text: what a cell says; shown if it fits into every cell.
        hints: the tooltip of each layer.
        turns: by layer, above 0 where it rose, below 0 where it fell since the picture before.
        heading: stands above the cells, where a page has several stacks.
        width: of the drawing; it becomes wider where cells would be too thin to see.
    """
    heading = shortened(heading, _HEADING_LENGTH)
    drawing = _Drawing(panel, values, scale, text, hints, turns or {}, 20.0 if heading else 2.0, width)
    shapes = [node("text", heading, x=0, y=13, class_="soft")] if heading else []
    shapes += [*drawing.cells(), *drawing.kinds()]
    height = drawing.bottom
    if panel.rows != (None,):
        shapes += drawing.blocks()
        height += 18
    right = max(drawing.x(len(panel.rows)) + 6, len(heading) * _LETTER + 8)
    style = f"min-width:{right * 0.85:.0f}px;max-width:{right * 1.15:.0f}px"
    return frame(identity, title, drawing.in_words(), right, height, *shapes, style=style)


@dataclass(frozen=True)
class _Drawing:
    """The places of the cells, and the parts of the drawing."""

    panel: Panel
    values: Mapping[str, float | None]
    scale: tuple[float, float]
    text: Callable[[float], str]
    hints: Mapping[str, str]
    turns: Mapping[str, int]
    top: float
    width: float

    @property
    def left(self) -> float:
        return max(len("block"), min(_LABEL_LENGTH, max(map(len, self.panel.kinds)))) * _LETTER + 8

    @property
    def pitch(self) -> float:
        """From the start of a cell to that of the next one."""
        return min(35.5, max(3.4, (self.width - self.left) / len(self.panel.rows)))

    @property
    def cell(self) -> float:
        return self.pitch - min(_GAP, 0.2 * self.pitch)

    @property
    def bottom(self) -> float:
        return self.y(len(self.panel.kinds))

    def x(self, column: int) -> float:
        return self.left + column * self.pitch

    def y(self, line: int) -> float:
        return self.top + line * (_LINE + _GAP)

    def found(self) -> list[float]:
        """The values that there are."""
        return [value for name in self.panel.cells.values() if (value := self.values.get(name)) is not None]

    def cells(self) -> list[Markup]:
        """One group a layer: tooltip, colored box, figure and triangle where there is room."""
        columns = {row: self.x(column) for column, row in enumerate(self.panel.rows)}
        lines = {kind: self.y(line) for line, kind in enumerate(self.panel.kinds)}
        cell, narrow = self.cell, self.cell < _NARROW
        fits = all(len(self.text(value)) * _LETTER <= cell for value in self.found())
        turned = sum(bool(self.turns.get(name)) for name in self.panel.cells.values())
        marked = not narrow or turned <= len(self.panel.cells) / 3
        shapes = []
        for (row, kind), name in self.panel.cells.items():
            x, y, value = columns[row], lines[kind], self.values.get(name)
            box = node("rect", x=x, y=y, width=cell, height=_LINE, rx=min(2.5, cell / 3))
            parts = [node("title", self.hints[name]), box]
            if value is not None and fits:
                parts.append(node("text", self.text(value), x=x + cell / 2, y=y + 12.5, text_anchor="middle"))
            if marked and (turn := self.turns.get(name, 0)):
                parts.append(_triangle(x + cell, y, min(5.0, cell * 0.7), rose=turn > 0))
            color = f"q{level(value, *self.scale)}" if value else "zero narrow" if narrow else "zero"
            shapes.append(node("g", *parts, class_=f"cell {color}"))
        return shapes

    def kinds(self) -> list[Markup]:
        """Names of the kinds at the left."""
        return [
            node(
                "text",
                shortened(kind, _LABEL_LENGTH),
                x=self.left - 6,
                y=self.y(line) + 12.5,
                text_anchor="end",
                class_="mono",
            )
            for line, kind in enumerate(self.panel.kinds)
        ]

    def blocks(self) -> list[Markup]:
        """Block indices below, as many as there is room for."""
        every, y = max(1, math.ceil(20.0 / self.pitch)), self.bottom + 12
        shapes = [node("text", "block", x=self.left - 6, y=y, text_anchor="end", class_="soft small")]
        for column, row in list(enumerate(self.panel.rows))[::every]:
            middle = self.x(column) + self.cell / 2
            shapes.append(node("text", str(row), x=middle, y=y, text_anchor="middle", class_="soft small"))
        return shapes

    def in_words(self) -> str:
        """How many cells, from what to what, and how many rose and fell."""
        found, count = self.found(), len(self.panel.cells)
        words = f"{count} cells, none with a figure"
        if found:
            words = (
                f"{count} cells, {len(found)} with a figure, from {self.text(min(found))} to {self.text(max(found))}"
            )
        turns = [self.turns.get(name, 0) for name in self.panel.cells.values()]
        rose, fell = sum(turn > 0 for turn in turns), sum(turn < 0 for turn in turns)
        return f"{words}; {rose} rose, {fell} fell." if self.turns else f"{words}."


def _triangle(right: float, y: float, size: float, *, rose: bool) -> Markup:
    """In the upper corner of a cell and pointing up, or in the lower one and pointing down."""
    start = f"M{right - size - 0.5:.1f} {y + (size + 1.5 if rose else _LINE - size - 1.5):.1f}"
    return node("path", d=f"{start}h{size:.1f}l{-size / 2:.1f} {-size if rose else size:.1f}z")
