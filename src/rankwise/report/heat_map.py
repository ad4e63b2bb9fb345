"""A heat map of layers: depth from left to right, kinds from top to bottom, with the means along both edges."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from rankwise.report.grid import Panel
from rankwise.report.svg import frame, level, node
from rankwise.report.words import shortened

__all__ = ["heat_map"]

_CELL_HEIGHT, _GAP, _TOP = 28.0, 2.0, 54.0
_EDGE_HEIGHT, _EDGE_WIDTH = 36.0, 40.0
_LETTER = 7.0
"""The width of a character, on the wide side."""
_LABEL_LENGTH = 30


def heat_map(
    identity: str,
    title: str,
    panel: Panel,
    values: Mapping[str, float],
    *,
    scale: tuple[float, float],
    text: Callable[[float], str],
    hints: Mapping[str, str],
) -> Markup:
    """Values of one stack of layers, one cell a layer.

    Args:
        identity: unique in the page.
        title: what the picture is.
        panel: the layers' places.
        values: by full layer name, >= 0; every layer of the panel has one.
        scale: the ends of the color scale, shared by all panels of a page.
        text: what a cell says; shown if it fits into every cell.
        hints: the tooltip of each layer.
    """
    shown = {name: values[name] for name in panel.cells.values()}
    drawing = _Drawing(panel, shown, scale, text, hints)
    description = f"{len(shown)} layers, from {text(min(shown.values()))} to {text(max(shown.values()))}."
    indexed = panel.rows != (None,)
    width, height = drawing.right + (96.0 if indexed else 4.0), drawing.bottom + (24.0 if indexed else 4.0)
    # A phone scrolls rather than shrinks the figures out of sight; a wide page does not blow them up.
    style = f"min-width:{min(width, max(width * 0.6, 330)):.0f}px;max-width:{width * 1.25:.0f}px"
    shapes = [*drawing.cells(), *drawing.kinds()]
    if indexed:
        shapes += [*drawing.kind_means(), *drawing.blocks()]
    return frame(identity, title, description, width, height, *shapes, style=style)


@dataclass(frozen=True)
class _Drawing:
    """The places of the cells, and the three layers of the drawing."""

    panel: Panel
    values: Mapping[str, float]
    scale: tuple[float, float]
    text: Callable[[float], str]
    hints: Mapping[str, str]

    @property
    def left(self) -> float:
        return max(len("block"), min(_LABEL_LENGTH, max(map(len, self.panel.kinds)))) * _LETTER + 14.0

    @property
    def cell(self) -> float:
        return min(76.0, max(17.0, 820.0 / len(self.panel.rows)))

    def x(self, column: int) -> float:
        return self.left + column * (self.cell + _GAP)

    def y(self, line: int) -> float:
        return (4.0 if self.panel.rows == (None,) else _TOP) + line * (_CELL_HEIGHT + _GAP)

    @property
    def right(self) -> float:
        return self.x(len(self.panel.rows))

    @property
    def bottom(self) -> float:
        return self.y(len(self.panel.kinds))

    def cells(self) -> list[Markup]:
        """One group a layer: tooltip, colored box, figure."""
        columns = {row: column for column, row in enumerate(self.panel.rows)}
        lines = {kind: line for line, kind in enumerate(self.panel.kinds)}
        fits = all(len(self.text(value)) * _LETTER <= self.cell + _GAP for value in self.values.values())
        shapes = []
        for (row, kind), name in self.panel.cells.items():
            x, y, value = self.x(columns[row]), self.y(lines[kind]), self.values[name]
            label = (
                [node("text", self.text(value), x=x + self.cell / 2, y=y + 18.5, text_anchor="middle")] if fits else []
            )
            box = node("rect", x=x, y=y, width=self.cell, height=_CELL_HEIGHT, rx=3)
            step = "zero" if value == 0 else f"q{level(value, *self.scale)}"
            shapes.append(node("g", node("title", self.hints[name]), box, *label, class_=f"cell {step}"))
        return shapes

    def kinds(self) -> list[Markup]:
        """Names of the kinds at the left."""
        x = self.left - 8
        return [
            node("text", shortened(kind, _LABEL_LENGTH), x=x, y=self.y(line) + 18.5, text_anchor="end", class_="mono")
            for line, kind in enumerate(self.panel.kinds)
        ]

    def kind_means(self) -> list[Markup]:
        """The mean of each kind as a bar at the right."""
        means, x = self._means(1), self.right + 8
        top = max(means.values()) or 1.0
        shapes = [node("text", "mean", x=x, y=_TOP - 8, class_="soft")]
        for line, kind in enumerate(self.panel.kinds):
            y, width = self.y(line), _EDGE_WIDTH * means[kind] / top
            shapes.append(node("rect", x=x, y=y + 10, width=width, height=8, rx=2, class_="edge"))
            shapes.append(node("text", self.text(means[kind]), x=x + 46, y=y + 18.5, class_="soft"))
        return shapes

    def blocks(self) -> list[Markup]:
        """The mean of each block as a bar above, block indices below."""
        rows = self.panel.rows
        means = self._means(0)
        top = max(means.values()) or 1.0
        every = max(1, math.ceil(24.0 / (self.cell + _GAP)))
        shapes = [node("text", "block", x=self.left - 8, y=self.bottom + 16, text_anchor="end", class_="soft")]
        for column, row in enumerate(rows):
            x, height = self.x(column), _EDGE_HEIGHT * means[row] / top
            shapes.append(node("rect", x=x, y=_TOP - 6 - height, width=self.cell, height=height, rx=2, class_="edge"))
            if column % every == 0:
                middle = x + self.cell / 2
                shapes.append(node("text", str(row), x=middle, y=self.bottom + 16, text_anchor="middle", class_="soft"))
        return shapes

    def _means(self, axis: int) -> dict[int | str | None, float]:
        """The mean of each block (axis 0) or kind (axis 1) over its layers."""
        groups: dict[int | str | None, list[float]] = defaultdict(list)
        for place, name in self.panel.cells.items():
            groups[place[axis]].append(self.values[name])
        return {key: sum(group) / len(group) for key, group in groups.items()}
