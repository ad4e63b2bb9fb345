"""From pydantic's errors to messages in the user's words: place, key, what is wrong, what is allowed."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import ErrorDetails

from rankwise.workflows.config_file import KeyPath, Source, nearest

__all__ = ["describe"]

_EXPECTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "too_short": "a list with at least one entry",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys of its own",
    "mapping_type": "keys of its own",
    "model_type": "keys of its own",
    "model_attributes_type": "keys of its own",
    "dataclass_type": "keys of its own",
    "none_required": "nothing",
}

_OWN_WORDS: Mapping[KeyPath, list[str]] = {
    ("data", "validation"): ["a path", "a hub id", "a share above 0 and below 1"],
}


def describe(
    errors: Iterable[ErrorDetails],
    source: Source,
    known: Mapping[KeyPath, frozenset[str]],
    advice: Mapping[KeyPath, str],
) -> list[str]:
    """One line for each faulty key, in the order of the file.

    Args:
        errors: what pydantic found.
        source: what was read, with its places.
        known: section path -> the keys that it may hold.
        advice: paths that are no keys -> what to write, or why not; a name alone holds in every section.
    """
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        grouped.setdefault(_key_path(error, source), []).append(error)
    lines: list[tuple[str, str]] = []
    for path, found in grouped.items():
        message = _message(path, found, known, advice)
        named = tuple(message.partition(" ")[0].rstrip(":").split("."))  # one of a whole section names its key first
        lines.append((source.place(named if named[: len(path)] == path else path), message))
    lines.sort(key=lambda line: _position(line[0]))
    return [f"{place}: {message}" for place, message in lines]


def _key_path(error: ErrorDetails, source: Source) -> KeyPath:
    """The key that an error is about: pydantic's location without list positions and names of union members."""
    location = tuple(str(part) for part in error["loc"] if not isinstance(part, int))
    if location[:1] == ("settings",):
        location = (location[1].replace("_", "-"), *location[2:]) if len(location) > 1 else ()
    if error["type"] == "missing":
        return location
    while location and location not in source.places and location[:-1] in source.places:
        location = location[:-1]
    return location


def _position(place: str) -> tuple[int, int]:
    """Sorts by line; faults without a line first, those of `--set` last."""
    line = place.rpartition(":")[2]
    if line.isdigit():
        return (1, int(line))
    return (2, 0) if place == "--set" else (0, 0)


def _message(
    path: KeyPath, errors: list[ErrorDetails], known: Mapping[KeyPath, frozenset[str]], advice: Mapping[KeyPath, str]
) -> str:
    """What is wrong with one key."""
    key = ".".join(path)
    first = errors[0]
    if first["type"] == "missing":
        return f"missing key '{key}'"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key '{key}'{_hint(path, known, advice)}"
    own = [error for error in errors if error["type"] not in _EXPECTED and not _is_range(error)]
    for error in own:
        if error["type"] == "value_error":
            cause = error.get("ctx", {}).get("error")
            faults = getattr(cause, "faults", None) or [str(cause)]
            return "; ".join(fault if fault.startswith(key) else f"{key}: {fault}" for fault in faults)
        if error["type"] not in ("literal_error", "enum"):
            return f"{key}: {error['msg']}" if key else str(error["msg"])
    allowed = _OWN_WORDS.get(path) or list(dict.fromkeys(_allowed(error) for error in errors))
    return f"{key}: expected {' or '.join(allowed)}, got {_shown(first['input'])}"


def _is_range(error: ErrorDetails) -> bool:
    return error["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def _allowed(error: ErrorDetails) -> str:
    """What would have been right, in words."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("literal_error", "enum"):
        return "one of " + str(context["expected"]).replace("'", "")
    for name, words in (("gt", "above"), ("ge", "of at least"), ("lt", "below"), ("le", "of at most")):
        if name in context:
            return f"a number {words} {context[name]:g}"
    return _EXPECTED.get(kind, str(error["msg"]))


def _shown(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hint(path: KeyPath, known: Mapping[KeyPath, frozenset[str]], advice: Mapping[KeyPath, str]) -> str:
    """The nearest key of the same section, the section where the key belongs, or the reason why it is none."""
    section, key = path[:-1], path[-1]
    told = advice.get(path) or advice.get((key,))
    if told:
        return f" ({told})"
    near = nearest(key, known.get(section, ()))
    if near:
        return near
    for other, keys in known.items():
        if key in keys and other != section:
            return f" (it belongs under '{'.'.join(other)}:')" if other else " (it belongs at the top of the file)"
    if section in known and len(known[section]) <= 20:
        return f"; allowed: {', '.join(sorted(known[section]))}"
    return ""
