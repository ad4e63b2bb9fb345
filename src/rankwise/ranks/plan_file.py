"""Reading plan.json field by field, so that every fault of a hand-edited file is found at once."""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from rankwise.errors import PlanError
from rankwise.ranks.shapes import ScalingRule

__all__ = ["FORMAT", "VERSION", "nearest", "parse", "read_layers", "read_model", "read_settings"]

FORMAT = "rankwise-plan"
VERSION = 1

Fields = dict[str, Any]
Faults = list[str]

_SETTINGS = (
    "format",
    "version",
    "model",
    "methods",
    "r",
    "lora_alpha",
    "scaling_rule",
    "budget",
    "seed",
    "notes",
    "overspend_allowed",
    "layers",
)
_LAYER = ("name", "out_features", "in_features", "rank", "importance", "reason")
_OPTIONAL = ("notes", "overspend_allowed", "importance", "reason")


def parse(text: str, source: str) -> Fields:
    """The top-level object of a plan, known to be one that this version reads.

    Args:
        text: the file's text.
        source: what to call it in errors, normally its path.

    Returns:
        The object, its fields unchecked but for `format` and `version`.

    Raises:
        PlanError: not JSON, cut off, a key said twice, not a plan, or a version that this rankwise does not read.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip())
        what = "ends too early: it was cut off" if cut else f"is not JSON: {error.msg}"
        raise PlanError(
            f"{source}:{error.lineno}:{error.colno}: the plan {what}; "
            "restore the file, or make it again with `rankwise plan`"
        ) from None
    except ValueError as error:
        raise PlanError(f"{source}: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        seen = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise PlanError(f'{source}: not a rankwise plan ("format" is {seen!r}, it must be {FORMAT!r})')
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise PlanError(
            f"{source}: plan version {version!r} cannot be read, this rankwise reads version {VERSION}; "
            "make the plan again with `rankwise plan`, or use the rankwise that wrote it"
        )
    return data


def read_settings(data: Fields, faults: Faults) -> Fields:
    """The checked settings of a plan (everything but model and layers); faults are appended."""
    _keys(data, _SETTINGS, "", faults)
    checks: Mapping[str, tuple[Callable[[Any], bool], str]] = {
        "methods": (_texts, "a list of method ids"),
        "r": (_at_least(1), "a whole number >= 1"),
        "lora_alpha": (_positive, "a number > 0"),
        "scaling_rule": (lambda v: v in tuple(ScalingRule), "one of " + ", ".join(f'"{rule}"' for rule in ScalingRule)),
        "budget": (_at_least(0), "a whole number of parameters >= 0"),
        "seed": (_whole, "a whole number"),
        "notes": (_texts, "a list of texts"),
        "overspend_allowed": (lambda v: isinstance(v, bool), "true or false"),
    }
    return _checked(data, checks, "", faults)


def read_model(value: object, faults: Faults) -> Fields:
    """The checked identity of the base model; faults are appended."""
    if not isinstance(value, dict):
        faults.append(f'"model" must be an object with "name" and "fingerprint", not {_shown(value)}')
        return {}
    _keys(value, ("name", "fingerprint"), '"model": ', faults)
    checks = dict.fromkeys(("name", "fingerprint"), (_text, "a text"))
    return _checked(value, checks, '"model": ', faults)


def read_layers(value: object, faults: Faults) -> list[Fields]:
    """The layers whose every field is right, in the file's order; the faults of the others are appended."""
    if not isinstance(value, list):
        faults.append(f'"layers" must be a list of layers, not {_shown(value)}')
        return []
    checks: Mapping[str, tuple[Callable[[Any], bool], str]] = {
        "name": (lambda v: _text(v) and bool(v), "the layer's full dotted name"),
        "out_features": (_at_least(1), "a whole number >= 1"),
        "in_features": (_at_least(1), "a whole number >= 1"),
        "rank": (_at_least(0), "a whole number >= 0 (0: no adapter)"),
        "importance": (lambda v: v is None or _number(v), "a number or null"),
        "reason": (_text, "a text"),
    }
    layers = []
    for index, entry in enumerate(value):
        if not isinstance(entry, dict):
            faults.append(f"layers[{index}] must be an object, not {_shown(entry)}")
            continue
        known = len(faults)
        name = entry.get("name")
        where = f"layers[{index}] ({name}): " if isinstance(name, str) and name else f"layers[{index}]: "
        _keys(entry, _LAYER, where, faults)
        fields = _checked(entry, checks, where, faults)
        if len(faults) == known:
            layers.append(fields)
    return layers


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the nearest known word, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _keys(entry: Fields, known: tuple[str, ...], where: str, faults: Faults) -> None:
    faults += [f"{where}unknown key {key!r}{nearest(key, known)}" for key in entry if key not in known]
    faults += [f"{where}the key {key!r} is missing" for key in known if key not in entry and key not in _OPTIONAL]


def _checked(
    entry: Fields, checks: Mapping[str, tuple[Callable[[Any], bool], str]], where: str, faults: Faults
) -> Fields:
    good = {}
    for key, (right, wanted) in checks.items():
        if key not in entry:
            continue
        if right(entry[key]):
            good[key] = entry[key]
        else:
            faults.append(f'{where}"{key}" must be {wanted}, not {_shown(entry[key])}')
    return good


def _whole(value: object) -> bool:
    return type(value) is int  # bool is an int to isinstance


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _text(value: object) -> bool:
    return isinstance(value, str)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _shown(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> Fields:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {next(k for k in keys if keys.count(k) > 1)!r} is said twice in one object: keep one"
        )
    return entry


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a plan may hold: write a finite number or null")
