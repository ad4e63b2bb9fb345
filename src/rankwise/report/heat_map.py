"""A heat map of layers: depth from left to right, kinds from top to bottom, with the means along both edges."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from rankwise.report.grid import Panel
from rankwise.report.svg import frame, level, node

__all__ = ["heat_map"]

_CELL_HEIGHT = 28.0
_GAP = 2.0


@dataclass(frozen=True, slots=True)
class _Board:
    """Where the cells of a heat map sit: kinds from top to bottom, blocks from left to right."""

    panel: Panel
    left: float
    top: float
    cell: float

    def x(self, column: int) -> float:
        return self.left + column * (self.cell + _GAP)

    def y(self, line: int) -> float:
        return self.top + line * (_CELL_HEIGHT + _GAP)

    @property
    def right(self) -> float:
        return self.x(len(self.panel.rows))

    @property
    def bottom(self) -> float:
        return self.y(len(self.panel.kinds))


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
    """Values of one stack of layers: depth from left to right, kinds from top to bottom, their means along both edges.

    Args:
        identity: unique in the page.
        title: what the picture is.
        panel: the layers' places.
        values: by full layer name; a layer without a value has no cell.
        scale: the ends of the color scale, shared by all panels of a page.
        text: what a cell says.
        hints: the tooltip of each layer.
    """
    cells = {place: name for place, name in panel.cells.items() if name in values}
    widest = max(len(kind) for kind in panel.kinds)
    board = _Board(panel, left=widest * 7.0 + 14.0, top=54.0, cell=min(62.0, max(17.0, 820.0 / len(panel.rows))))
    shapes = [
        _cell(board, row, kind, values[name], scale, text, hints.get(name, name)) for (row, kind), name in cells.items()
    ]
    found = [values[name] for name in cells.values()]
    description = f"{len(found)} layers, from {text(min(found))} to {text(max(found))}." if found else "No layers."
    width, height = board.right + 96.0, board.bottom + (24.0 if panel.rows != (None,) else 4.0)
    edges = [*_kind_edge(board, cells, values, text), *_depth_edge(board, cells, values)]
    style = f"min-width:{min(width, max(width * 0.72, 300)):.0f}px;max-width:{width * 1.3:.0f}px"
    return frame(identity, title, description, width, height, *shapes, *edges, style=style)


def _cell(
    board: _Board,
    row: int | None,
    kind: str,
    value: float,
    scale: tuple[float, float],
    text: Callable[[float], str],
    hint: str,
) -> Markup:
    x, y = board.x(board.panel.rows.index(row)), board.y(board.panel.kinds.index(kind))
    step = "zero" if value == 0 else f"q{level(value, *scale)}"
    label = text(value)
    fits = len(label) * 7.0 <= board.cell
    return node(
        "g",
        node("title", hint),
        node("rect", x=x, y=y, width=board.cell, height=_CELL_HEIGHT, rx=3),
        node("text", label if fits else "", x=x + board.cell / 2, y=y + 18.5, text_anchor="middle"),
        class_=f"cell {step}",
    )


def _kind_edge(
    board: _Board,
    cells: Mapping[tuple[int | None, str], str],
    values: Mapping[str, float],
    text: Callable[[float], str],
) -> list[Markup]:
    """Names of the kinds at the left; at the right the mean of each kind as a bar."""
    means = {
        kind: _mean([values[name] for (_, other), name in cells.items() if other == kind]) for kind in board.panel.kinds
    }
    top = max([*means.values(), 1e-300])
    shapes = [node("text", "mean", x=board.right + 8, y=board.top - 8, class_="soft")]
    for line, (kind, mean) in enumerate(means.items()):
        y = board.y(line)
        shapes += [
            node("text", kind, x=board.left - 8, y=y + 18.5, text_anchor="end", class_="mono"),
            node("rect", x=board.right + 8, y=y + 10, width=max(0.0, 40 * mean / top), height=8, rx=2, class_="edge"),
            node("text", text(mean), x=board.right + 54, y=y + 18.5, class_="soft"),
        ]
    return shapes


def _depth_edge(
    board: _Board, cells: Mapping[tuple[int | None, str], str], values: Mapping[str, float]
) -> list[Markup]:
    """The mean of each block as a bar above, block indices below."""
    rows = board.panel.rows
    if rows == (None,):
        return []
    means = [_mean([values[name] for (other, _), name in cells.items() if other == row]) for row in rows]
    top = max([*means, 1e-300])
    every = max(1, math.ceil(24.0 / (board.cell + _GAP)))
    shapes = []
    for column, (row, mean) in enumerate(zip(rows, means, strict=True)):
        height = max(0.0, 36 * mean / top)
        x = board.x(column)
        shapes.append(node("rect", x=x, y=board.top - 6 - height, width=board.cell, height=height, rx=2, class_="edge"))
        if column % every == 0:
            label = node(
                "text", str(row), x=x + board.cell / 2, y=board.bottom + 16, text_anchor="middle", class_="soft"
            )
            shapes.append(label)
    shapes.append(node("text", "block", x=board.left - 8, y=board.bottom + 16, text_anchor="end", class_="soft"))
    return shapes


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
