"""Which methods go together: the registry, the slots of a recipe, and the one table of refused combinations."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, Self

from rankwise.errors import ConfigError, RecipeError
from rankwise.methods.base import Budget, Method, Slot
from rankwise.methods.gora import GoRA
from rankwise.methods.lora import LoRA
from rankwise.methods.rora import RoRA

__all__ = ["METHODS", "REFUSALS", "RESERVED", "Recipe", "Refusal", "Situation", "method_class", "method_from_id"]

METHODS: Mapping[str, type[Method]] = {method.id: method for method in (LoRA, GoRA, RoRA)}

RESERVED: Mapping[str, str] = {
    "lora-ga": "LoRA-GA, arXiv 2407.05000",
    "lora-pro": "LoRA-Pro, arXiv 2407.18242",
    "lora-rite": "LoRA-RITE, arXiv 2410.20625",
    "ggpo": "LoRA-GGPO, arXiv 2502.14538v1",
    "mgpo": "LoRA-MGPO, arXiv 2502.14538v2",
    "ab-lora": "ALoRA (AB-LoRA), arXiv 2403.16187",
    "sora": "SoRA, arXiv 2311.11696",
    "beamlora": "BeamLoRA, arXiv 2502.13604",
    "xgblora": "XGBLoRA, arXiv 2410.19694",
}
"""Ids of methods that later versions bring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a recipe is asked to run in, as far as it is known; the defaults refuse nothing.

    Args:
        quantized: whether a target's weight is stored in 4 or 8 bits.
        offloaded: whether parameters lie on the meta device or on disk.
        collector: the gradient collector asked for.
        lora_options: options of PEFT's LoraConfig that were asked for beside ours.
    """

    quantized: bool = False
    offloaded: bool = False
    collector: Literal["auto", "outer", "param"] = "auto"
    lora_options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A set of methods whose slots do not collide; slots that nobody fills behave as plain LoRA.

    Args:
        methods: in the order given; at least one.

    Raises:
        RecipeError: if two fill the same slot, one is named twice, or `lora` stands beside another; all faults at once.
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        self.check(Situation())

    @classmethod
    def of(cls, methods: "Method | str | Sequence[Method | str] | Recipe") -> Self:
        """A recipe from one method, one id, or a list of either.

        Raises:
            RecipeError: for an unknown or reserved id, or methods that do not go together.
        """
        if isinstance(methods, Recipe):
            return cls(methods.methods)
        listed = [methods] if isinstance(methods, Method | str) else list(methods)
        return cls(tuple(method_from_id(method) if isinstance(method, str) else method for method in listed))

    @property
    def ids(self) -> tuple[str, ...]:
        """The methods' ids, in order."""
        return tuple(method.id for method in self.methods)

    def owner(self, slot: Slot) -> Method | None:
        """The method that fills the slot, or None."""
        return next((method for method in self.methods if slot in method.slots), None)

    @property
    def allocate(self) -> Method:
        """Who decides the ranks; plain LoRA's uniform rank if nobody does."""
        return self.owner(Slot.ALLOCATE) or LoRA()

    @property
    def initialize(self) -> Method:
        """Who writes the factors at step 0; plain LoRA's if nobody does."""
        return self.owner(Slot.INITIALIZE) or LoRA()

    @property
    def scale(self) -> Method:
        """Who gives the scaling rule; plain LoRA's alpha / rank if nobody does."""
        return self.owner(Slot.SCALE) or LoRA()

    @property
    def optimize(self) -> Method | None:
        """Who moves the factors; None is AdamW."""
        return self.owner(Slot.OPTIMIZE)

    @property
    def schedule(self) -> Method | None:
        """Who acts around steps; None does nothing."""
        return self.owner(Slot.SCHEDULE)

    @property
    def needs_gradients(self) -> bool:
        """Whether a method asks for gradient statistics, so that calibration batches are needed."""
        return any(type(method).request is not Method.request for method in self.methods)

    def notes(self, ranks: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
        """What the methods have to say beside a plan."""
        return tuple(note for method in self.methods for note in method.notes(ranks, budget))

    def check(self, situation: Situation) -> None:
        """Refuses what cannot work in this situation, before anything is computed.

        Raises:
            RecipeError: with every refusal that applies; each names both sides and what is allowed.
        """
        faults = [refusal.reason(self, situation) for refusal in REFUSALS if refusal.applies(self, situation)]
        if faults:
            raise RecipeError(faults)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One line of the table: when it applies, and why it is refused."""

    applies: Callable[[Recipe, Situation], bool]
    reason: Callable[[Recipe, Situation], str]


# PEFT options that change what lora_B @ lora_A means, or who owns the factors, and what may stand there.
_LORA_OPTIONS: Mapping[str, str] = {
    "use_rslora": "the method owns the scaling; use rora for alpha / sqrt(rank)",
    "rank_pattern": "the plan owns the ranks; edit them in a plan file",
    "alpha_pattern": "the plan owns the scalings; leave it out",
    "trainable_token_indices": "it trains embedding rows outside the factors; leave it out",
    "use_dora": "its norm depends on the update; leave it out",
    "lora_bias": "a bias on lora_B is not part of a plain adapter; leave it out",
    "use_qalora": "QALoRA pools the input of lora_A; leave it out",
    "use_bdlora": "it splits the factors in blocks; leave it out",
    "kasa_config": "KaSA writes the base weights; leave it out",
    "velora_config": "VeLoRA changes what lora_A sees; leave it out",
    "monteclora_config": "MonteCLoRA samples the update; leave it out",
    "arrow_config": "Arrow routes between adapters; leave it out",
    "alora_invocation_tokens": "Activated LoRA adapts some tokens only; leave it out",
    "target_parameters": "expert and other bare parameters are not linear layers; use target_modules",
    "layer_replication": "replicated layers share weights; leave it out",
    "loftq_config": "LoftQ writes the base weights; leave it out",
    "corda_config": "CorDA writes the base weights; leave it out",
    "eva_config": "EVA initializes lora_A itself; leave it out",
    "lora_ga_config": "PEFT's LoRA-GA writes the base weights; leave it out",
}


def _colliding(recipe: Recipe) -> dict[Slot, list[str]]:
    owners = {slot: [method.id for method in recipe.methods if slot in method.slots] for slot in Slot}
    return {slot: ids for slot, ids in owners.items() if len(ids) > 1}


def _refused_options(situation: Situation) -> list[str]:
    asked = {key: value for key, value in situation.lora_options.items() if value not in (None, False, (), [], {})}
    told = [f"{key}: {_LORA_OPTIONS[key]}" for key in asked if key in _LORA_OPTIONS]
    if asked.get("bias", "none") != "none":
        told.append(f"bias: {asked['bias']!r}: a plain adapter holds no bias; use none")
    start = situation.lora_options.get("init_lora_weights", True)
    if start is not True:
        told.append(f"init_lora_weights: {start!r}: the method owns the start of the factors; use true")
    return told


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        lambda recipe, _: not recipe.methods,
        lambda *_: f"method: a recipe needs at least one method; use one of {', '.join(METHODS)}",
    ),
    Refusal(
        lambda recipe, _: len(set(recipe.ids)) < len(recipe.ids),
        lambda recipe, _: f"method: {', '.join(recipe.ids)} names a method twice; name each once",
    ),
    Refusal(
        lambda recipe, _: "lora" in recipe.ids and len(set(recipe.ids)) > 1,
        lambda recipe, _: (
            f"method: lora is what every unfilled slot does already, beside {_others(recipe, 'lora')}; leave lora out"
        ),
    ),
    Refusal(
        lambda recipe, _: len(set(recipe.ids)) == len(recipe.ids) and bool(_colliding(recipe)),
        lambda recipe, _: "; ".join(
            f"method: {' and '.join(ids)} both fill the {slot} slot; keep one of them"
            for slot, ids in _colliding(recipe).items()
        ),
    ),
    Refusal(
        lambda _, situation: bool(_refused_options(situation)),
        lambda recipe, situation: f"{_together(recipe)} cannot run with " + "; ".join(_refused_options(situation)),
    ),
    Refusal(
        lambda recipe, situation: recipe.needs_gradients and situation.quantized and situation.collector == "param",
        lambda recipe, _: (
            f"calibration.collector: param reads the gradient of packed weights, which {_together(recipe)} cannot "
            "use on a quantized model; use outer or auto"
        ),
    ),
    Refusal(
        lambda recipe, situation: recipe.needs_gradients and situation.offloaded,
        lambda recipe, _: (
            f"{_together(recipe)} needs gradients, and parts of the model are offloaded to disk or the meta device; "
            "load it without offloading, or use lora or rora"
        ),
    ),
)
"""Every refused combination that this version can meet; a method that arrives adds its lines here."""


def method_class(method_id: str) -> type[Method]:
    """The class behind an id.

    Raises:
        RecipeError: if the id is reserved for a later version or unknown; the nearest name and all ids are told.
    """
    known = METHODS.get(method_id)
    if known is not None:
        return known
    if method_id in RESERVED:
        raise RecipeError(
            f"method: {method_id} ({RESERVED[method_id]}) is not yet in this version; use one of {', '.join(METHODS)}"
        )
    plain = str(method_id).lower().replace("_", "-")
    near = difflib.get_close_matches(plain, [*METHODS, *RESERVED], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise RecipeError(f"method: {method_id!r} is not known{hint}; use one of {', '.join(METHODS)}")


def method_from_id(method_id: str, settings: Mapping[str, object] | None = None, preset: str | None = None) -> Method:
    """The method with a preset's settings, overridden by the user's.

    Args:
        method_id: an id of `METHODS`.
        settings: keyword arguments of the method's dataclass.
        preset: a name of the method's `presets`, or None.

    Raises:
        RecipeError: for an unknown or reserved id.
        ConfigError: for an unknown preset, unknown settings (nearest names, all at once) or values out of range.
    """
    kind = method_class(method_id)
    if preset is not None and preset not in kind.presets:
        named = f"use one of {', '.join(kind.presets)}" if kind.presets else "it has none; leave preset out"
        raise ConfigError(f"preset: {method_id} has no preset {preset!r}; {named}")
    known = [entry.name for entry in fields(kind)]
    given = dict(settings or {})
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


def _others(recipe: Recipe, method_id: str) -> str:
    return " and ".join(other for other in recipe.ids if other != method_id)


def _together(recipe: Recipe) -> str:
    return " + ".join(recipe.ids)
