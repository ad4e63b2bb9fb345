"""Figures and settings as people read them; the page and the terminal say them alike."""

import math
from collections.abc import Mapping

__all__ = ["duration", "facts", "figure", "plain", "shortened", "with_verification"]


def figure(value: float, digits: int = 4) -> str:
    """A number as people read it: thousands grouped, `digits` significant digits, an exponent only far from 1."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 10**digits:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """A time span in its two largest units: `0.42 s`, `38 s`, `2 min 5 s`, `3 h 20 min`."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shortened(text: str, length: int) -> str:
    """The end of a text that is too long, behind an ellipsis: the end of a layer's name says most."""
    return text if len(text) <= length else "…" + text[len(text) - length + 1 :]


def facts(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (name, text) lines: names in words, numbers as people read them."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        name = " · ".join(filter(None, (prefix, key.replace("_", " "))))
        if isinstance(value, dict):
            lines += facts(value, name)
        elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
            for number, item in enumerate(value, 1):
                lines += facts(item if isinstance(item, dict) else {"": item}, f"{name} {number}")
        else:
            lines.append((name, plain(value, key)))
    return lines


def plain(value: object, key: str = "") -> str:
    """One value as people read it; the key's name says whether a number is a share or a time."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int() | float() if _is_share(key) and 0 <= value <= 1:
            return f"{value:.2%}"
        case int() | float() if key.endswith("seconds"):
            return duration(value)
        case int() | float():
            return figure(value)
        case list() | tuple():
            return ", ".join(plain(item, key) for item in value) or "none"
        case _:
            return str(value)


def _is_share(key: str) -> bool:
    return "accuracy" in key or key.endswith(("share", "fraction"))


def with_verification(export: Mapping[str, object]) -> dict[str, object]:
    """An export's figures with those of its verification among them.

    Args:
        export: what `ExportReport.to_dict()` returns, or the manifest's `export`.
    """
    inner = export.get("verification")
    outer = {key: value for key, value in export.items() if key != "verification"}
    known = {key: value for key, value in outer.items() if value is not None}
    return outer | (dict(inner) if isinstance(inner, Mapping) else {}) | known
