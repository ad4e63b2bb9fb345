"""Which linear layers get an adapter: PEFT's matching rules; a near miss is an error, a refusal has a reason."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn

from rankwise.adapters.layers import LinearLayer, view_linear
from rankwise.adapters.refusals import listed, refusal, refuse_adapted, refuse_wrapped, shared_names
from rankwise.errors import TargetError
from rankwise.ranks.shapes import LayerShape

__all__ = [
    "HEAD_NAMES",
    "Patterns",
    "Targets",
    "check_patterns",
    "checked_views",
    "is_saved",
    "match_pattern",
    "resolve_targets",
]

Patterns = str | Sequence[str]
"""A regular expression that must match the full name, or a list of full names or dotted endings of names."""

HEAD_NAMES = ("classifier", "score", "qa_outputs")
"""Task heads that PEFT trains in full (its classification and question-answering tasks)."""

_ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Targets:
    """The layers to adapt, in the order of `model.named_modules()`, and what a user should know of the choice."""

    layers: tuple[LinearLayer, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The full names, relative to the base model."""
        return tuple(layer.name for layer in self.layers)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The sizes, as the rank arithmetic wants them."""
        return tuple(layer.shape for layer in self.layers)


def resolve_targets(
    model: nn.Module,
    target_modules: Patterns | None,
    *,
    exclude_modules: Patterns | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> Targets:
    """The linear layers that PEFT would adapt under the same settings, checked before anything is built.

    Args:
        model: the base model, without adapters.
        target_modules: None (PEFT's default for the architecture), `"all-linear"` (all but the output head), a regular
            expression that matches full names, or a list of names (`"q_proj"`, `"layers.3.self_attn.q_proj"`).
        exclude_modules: a regular expression or list of names that are never adapted.
        modules_to_save: names of modules that are trained in full; nothing inside them is adapted, nor are task heads.

    Returns:
        The layers, and notes on entries that matched nothing and layers that were passed over.

    Raises:
        TargetError: a pattern that matches nothing, or something that cannot be adapted; every fault at once.
        ModelError: the model is wrapped (torch.compile, data parallelism, ...) or already carries adapters.
    """
    refuse_wrapped(model)
    refuse_adapted(model)
    modules = {name: module for name, module in model.named_modules() if name}
    notes = check_patterns(modules, exclude_modules, modules_to_save)
    passed_over = _passed_over(model, modules, exclude_modules, modules_to_save)
    if isinstance(target_modules, str) and target_modules.lower() == _ALL_LINEAR:
        chosen, more = _all_linear(model, modules, passed_over)
    else:
        chosen, more = _matched(model, modules, _or_default(model, target_modules), passed_over)
    layers = checked_views(model, chosen)
    return Targets(layers, (*notes, *more))


def match_pattern(pattern: Patterns, name: str) -> bool:
    """Whether PEFT would match: a string is a regular expression for the full name, list entries equal or end it."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in pattern)


def is_saved(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether the module `name` is one of `modules_to_save` or lies inside one, by PEFT's rule."""
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in modules_to_save)


def _or_default(model: nn.Module, target_modules: Patterns | None) -> Patterns:
    if target_modules is not None:
        return target_modules
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        raise TargetError(
            "target_modules is not set and PEFT has no default for this architecture "
            f"({model_type or type(model).__name__}): set it to {_ALL_LINEAR!r} or a list of names. {_available(model)}"
        )
    default: Patterns = DEFAULT_TARGETS[model_type]
    return default


def check_patterns(
    modules: Mapping[str, nn.Module], exclude_modules: Patterns | None, modules_to_save: Sequence[str] | None
) -> list[str]:
    """Notes on entries of `exclude_modules` and `modules_to_save` that match nothing.

    Raises:
        TargetError: a key of which no entry matches, or that is malformed.
    """
    faults: list[str] = []
    notes: list[str] = []
    if exclude_modules:
        _check_pattern(modules, "exclude_modules", exclude_modules, faults, notes)
    if isinstance(modules_to_save, str):
        raise TargetError(
            f"modules_to_save is {modules_to_save!r}: it must be a list of names, here [{modules_to_save!r}]"
        )
    if modules_to_save:
        _check_pattern(modules, "modules_to_save", modules_to_save, faults, notes)
    if faults:
        raise TargetError(faults)
    return notes


def _check_pattern(
    modules: Mapping[str, nn.Module], key: str, pattern: Patterns, faults: list[str], notes: list[str]
) -> None:
    _check_form(key, pattern)
    entries = [pattern] if isinstance(pattern, str) else list(dict.fromkeys(pattern))
    empty = [e for e in entries if not any(match_pattern(pattern if e is pattern else [e], name) for name in modules)]
    texts = [f"{key}: {entry!r} matches no module{_nearest(entry, modules)}" for entry in empty]
    if len(empty) == len(entries):
        faults += texts
    else:
        notes += texts


def _check_form(key: str, pattern: Patterns) -> None:
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise TargetError(
                f"{key}: {pattern!r} is not a regular expression ({error}): correct it or write a list"
            ) from None
        return
    wrong = [entry for entry in pattern if not isinstance(entry, str) or not entry]
    if wrong or not pattern:
        seen = f"holds {wrong[0]!r}" if wrong else "is an empty list"
        raise TargetError(
            f"{key} {seen}: give a regular expression or a list of module names such as ['q_proj', 'v_proj']"
        )


def _passed_over(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    exclude_modules: Patterns | None,
    modules_to_save: Sequence[str] | None,
) -> dict[str, str]:
    """Why a module is never a target: excluded, saved in full, or (part of) a task head."""
    heads = _task_heads(model)
    reasons = {}
    for name in modules:
        if exclude_modules and match_pattern(exclude_modules, name):
            reasons[name] = "is named by exclude_modules"
        elif modules_to_save and is_saved(name, modules_to_save):
            reasons[name] = "is trained in full (modules_to_save)"
        elif name.split(".")[0] in heads:
            reasons[name] = "belongs to the task head: train it in full with modules_to_save"
    return reasons


def _task_heads(model: nn.Module) -> tuple[str, ...]:
    if _output_head(model) is not None:
        return ()
    return tuple(name for name in HEAD_NAMES if isinstance(getattr(model, name, None), nn.Module))


def _output_head(model: nn.Module) -> nn.Module | None:
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _all_linear(
    model: nn.Module, modules: Mapping[str, nn.Module], passed_over: Mapping[str, str]
) -> tuple[dict[str, nn.Module], list[str]]:
    head = _output_head(model)
    chosen = {}
    notes = []
    for name, module in modules.items():
        if name in passed_over or module is head or view_linear(name, module) is None:
            continue
        reason = refusal(model, name, module)
        if reason is None or module.weight.device.type == "meta":
            chosen[name] = module
        else:
            notes.append(f"{name} is left out of {_ALL_LINEAR!r}: {reason}")
    experts = [f"{n} {tuple(p.shape)}" for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n]
    if experts:
        notes.append(
            f"{len(experts)} stacked expert weights stay frozen (first: {experts[0]}): they are not linear layers"
        )
    if not chosen:
        raise TargetError(f"target_modules: {_ALL_LINEAR!r} finds no linear layer to adapt. {_available(model)}")
    return chosen, notes


def _matched(
    model: nn.Module, modules: Mapping[str, nn.Module], pattern: Patterns, passed_over: Mapping[str, str]
) -> tuple[dict[str, nn.Module], list[str]]:
    _check_form("target_modules", pattern)
    entries: list[Patterns] = [pattern] if isinstance(pattern, str) else [[e] for e in dict.fromkeys(pattern)]
    chosen: set[str] = set()
    misses = []
    for entry in entries:
        hits = {name for name in modules if match_pattern(entry, name)}
        live = hits - passed_over.keys()
        chosen |= live
        if not live:
            misses.append(f"target_modules: {_miss(model, modules, entry, sorted(hits), passed_over)}")
    if not chosen:
        raise TargetError([*misses, _available(model)])
    return {name: module for name, module in modules.items() if name in chosen}, misses


def _miss(
    model: nn.Module, modules: Mapping[str, nn.Module], entry: Patterns, hits: list[str], passed_over: Mapping[str, str]
) -> str:
    """Why an entry selects nothing."""
    shown = entry if isinstance(entry, str) else entry[0]
    if hits:
        return f"{shown!r} selects only what is never adapted: {hits[0]} {passed_over[hits[0]]}"
    stacked = [n for n, p in model.named_parameters() if p.dim() >= 3 and match_pattern(entry, n)]
    if stacked:
        return (
            f"{shown!r} names the parameter {stacked[0]}, stacked expert weights: they are not linear layers, and "
            "servers do not agree on a format for adapters on them; adapt the attention layers instead"
        )
    leaf = isinstance(entry, str) and [n for n in modules if n.endswith(f".{entry}") or n == entry]
    if leaf:
        return (
            f"{shown!r} matches nothing: a string is a regular expression for the full name (such as {leaf[0]!r}); "
            f"write a list to name endings: [{shown!r}]"
        )
    return f"{shown!r} matches no module{_nearest(shown, modules)}"


def checked_views(model: nn.Module, chosen: Mapping[str, nn.Module]) -> tuple[LinearLayer, ...]:
    """The views of the chosen modules, in order.

    Raises:
        TargetError: any of them cannot be adapted; names grouped by reason.
    """
    reasons: dict[str, list[str]] = defaultdict(list)
    layers = []
    shared = shared_names(model)
    for name, module in chosen.items():
        view = view_linear(name, module)
        reason = refusal(model, name, module) or shared.get(name)
        if reason is None and view is not None:
            layers.append(view)
        else:
            reasons[reason or "is not a linear layer"].append(name)
    if reasons:
        raise TargetError([f"{listed(names)} cannot be adapted: {reason}" for reason, names in reasons.items()])
    return tuple(layers)


def _nearest(entry: str, modules: Mapping[str, nn.Module]) -> str:
    """The nearest names, over full names, and over the endings of names with as many parts as the entry."""
    parts = entry.count(".") + 1
    endings = {".".join(name.split(".")[-parts:]) for name in modules}
    close = difflib.get_close_matches(entry, sorted(endings), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def _available(model: nn.Module) -> str:
    leaves = Counter(
        name.split(".")[-1] for name, module in model.named_modules() if view_linear(name, module) is not None
    )
    if not leaves:
        return "The model has no linear layers."
    return "Linear layers of this model: " + ", ".join(f"{name} ({count})" for name, count in leaves.items())
