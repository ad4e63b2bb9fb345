"""What there is to choose from: the methods, their settings and defaults, as plain values."""

from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from rankwise.methods.base import Method, Slot
from rankwise.methods.recipe import METHODS, method_class

__all__ = ["describe_method", "describe_methods"]


def describe_methods() -> list[dict[str, Any]]:
    """One dict a method.

    `learning_rate` holds the recommended low end, default and high end under `optimizer`.
    """
    return [_summary(method) for method in METHODS.values()]


def describe_method(method_id: str) -> dict[str, Any]:
    """One method with its settings, presets and recommended learning rates.

    Raises:
        RecipeError: if the id is unknown (the nearest is named).
    """
    method = method_class(method_id)
    hints = get_type_hints(method)
    return {
        **_summary(method),
        "settings": [
            {"name": entry.name, "type": _type_name(hints[entry.name]), "default": _default(entry)}
            for entry in fields(method)
        ],
        "presets": {name: dict(settings) for name, settings in method.presets.items()},
    }


def _summary(method: type[Method]) -> dict[str, Any]:
    low, usual, high = method.learning_rates
    return {
        "id": method.id,
        "title": method.title,
        "source": method.source,
        "slots": [str(slot) for slot in Slot if slot in method.slots],
        "learning_rate": {"low": low, "default": usual, "high": high},
        "optimizer": method.id if Slot.OPTIMIZE in method.slots else "AdamW",
        "state": "works",
    }


def _default(entry: "Field[Any]") -> Any:
    if entry.default is not MISSING:
        return entry.default
    return entry.default_factory() if entry.default_factory is not MISSING else None


def _type_name(hint: Any) -> str:
    arguments = getattr(hint, "__args__", None)
    if getattr(hint, "__origin__", None) is not None and str(hint).startswith("typing.Literal"):
        return " | ".join(map(str, arguments or ()))
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint).replace("typing.", "")
