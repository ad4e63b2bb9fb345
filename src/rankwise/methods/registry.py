"""Which methods there are, and how an id and its settings become one."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields

from rankwise.errors import ConfigError, RecipeError
from rankwise.methods.ab_lora import ABLoRA
from rankwise.methods.base import Method
from rankwise.methods.beamlora import BeamLoRA
from rankwise.methods.ggpo import GGPO, MGPO
from rankwise.methods.gora import GoRA
from rankwise.methods.lora import LoRA
from rankwise.methods.lora_ga import LoRAGA
from rankwise.methods.lora_pro import LoRAPro
from rankwise.methods.lora_rite import LoRARITE
from rankwise.methods.rora import RoRA
from rankwise.methods.sora import SoRA
from rankwise.methods.xgblora import XGBLoRA

__all__ = ["METHODS", "method_class", "method_from_id"]

METHODS: Mapping[str, type[Method]] = {
    method.id: method
    for method in (LoRA, GoRA, RoRA, LoRAGA, LoRAPro, LoRARITE, GGPO, MGPO, ABLoRA, SoRA, BeamLoRA, XGBLoRA)
}


def method_class(method_id: str) -> type[Method]:
    """The class behind an id.

    Raises:
        RecipeError: if the id is unknown; the nearest name and all ids are told.
    """
    known = METHODS.get(method_id)
    if known is not None:
        return known
    plain = str(method_id).lower().replace("_", "-")
    near = difflib.get_close_matches(plain, METHODS, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise RecipeError(f"method: {method_id!r} is not known{hint}; use one of {', '.join(METHODS)}")


def method_from_id(method_id: str, settings: Mapping[str, object] | None = None, preset: str | None = None) -> Method:
    """The method with a preset's settings, overridden by the user's.

    Args:
        method_id: an id of `METHODS`.
        settings: keyword arguments of the method's dataclass; lists, as files hold them, become tuples.
        preset: a name of the method's `presets`, or None.

    Raises:
        RecipeError: for an unknown id.
        ConfigError: for an unknown preset, unknown settings (nearest names, all at once) or values out of range.
    """
    kind = method_class(method_id)
    if preset is not None and preset not in kind.presets:
        named = f"use one of {', '.join(kind.presets)}" if kind.presets else "it has none; leave preset out"
        raise ConfigError(f"preset: {method_id} has no preset {preset!r}; {named}")
    known = [entry.name for entry in fields(kind)]
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in (settings or {}).items()}
    faults = [_unknown_setting(method_id, key, known) for key in given if key not in known]
    if faults:
        raise ConfigError(faults)
    return kind(**{**(kind.presets[preset] if preset else {}), **given})


def _unknown_setting(method_id: str, key: str, known: Sequence[str]) -> str:
    if not known:
        return f"{method_id}.{key}: {method_id} has no settings of its own"
    near = difflib.get_close_matches(key, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{method_id}.{key} is not a setting{hint}; use one of {', '.join(known)}"
