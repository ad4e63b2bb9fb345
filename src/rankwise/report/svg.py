"""Small pieces for drawing SVG by hand: escaped elements, an accessible frame, color steps and axis ticks."""

import math
import sys
from collections.abc import Sequence

from markupsafe import Markup, escape

__all__ = ["LEVELS", "frame", "level", "node", "thin", "ticks"]

LEVELS = 9
"""Steps of the color scale."""


def node(tag: str, *children: str | Markup, **attributes: str | float | None) -> Markup:
    """One element; every text and attribute is escaped, markup made by `node` is not escaped twice.

    Args:
        tag: the element's name.
        children: text or elements.
        attributes: `class_` stands for class, other underscores for hyphens; numbers keep two
            decimals; None leaves one out.
    """
    pairs = (
        (name.rstrip("_").replace("_", "-"), _number(value) if isinstance(value, float | int) else value)
        for name, value in attributes.items()
        if value is not None
    )
    head = "".join(f' {name}="{escape(value)}"' for name, value in pairs)
    body = "".join(escape(child) for child in children)
    return Markup(f"<{tag}{head}>{body}</{tag}>")


def frame(
    identity: str,
    title: str,
    description: str,
    width: float,
    height: float,
    *shapes: Markup,
    style: str | None = None,
    stretch: bool = False,
) -> Markup:
    """An SVG image with an accessible name and description, scaling with its container.

    Args:
        identity: unique in the page; the ids of title and description follow from it.
        title: what the picture is, for a screen reader.
        description: what the picture shows, in a sentence.
        width: of the drawing, in user units.
        height: of the drawing, in user units.
        shapes: the drawing.
        style: CSS of the outer element.
        stretch: fill the element's box in both directions instead of keeping the proportions.
    """
    return node(
        "svg",
        node("title", title, id=f"{identity}-title"),
        node("desc", description, id=f"{identity}-desc"),
        *shapes,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_number(width)} {_number(height)}",
        role="img",
        aria_labelledby=f"{identity}-title {identity}-desc",
        class_="chart",
        preserveAspectRatio="none" if stretch else None,
        style=style,
    )


def level(value: float, low: float, high: float) -> int:
    """The step of the color scale, 0 to 8, for a value in [low, high]; the middle one when all values are equal."""
    if not math.isfinite(value):
        return 0
    return (LEVELS - 1) // 2 if high <= low else round((LEVELS - 1) * (value - low) / (high - low))


def ticks(low: float, high: float, count: int = 4) -> tuple[float, ...]:
    """Round numbers that cover [low, high]: the first is not above `low`, the last not below `high`.

    Args:
        low: finite.
        high: finite, >= low.
        count: about how many steps.
    """
    if high - low < sys.float_info.min:  # equal, or apart by less than a step could be
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(place * step for place in range(first, last + 1))


def thin(points: Sequence[tuple[float, float]], limit: int = 400) -> list[tuple[float, float]]:
    """At most `limit` points: means of equal runs of neighbors, so that no reading is left out."""
    if len(points) <= limit:
        return list(points)
    run = math.ceil(len(points) / limit)
    groups = [points[start : start + run] for start in range(0, len(points), run)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
