"""The five slots that a method may fill; a slot that nobody fills behaves as plain LoRA."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal, Protocol

from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.statistics import GradientStatistics, LayerStatistics, StatisticsRequest
from rankwise.methods.schedule import Scene, Schedule
from rankwise.ranks.shapes import LayerShape, ScalingRule

__all__ = [
    "Allocation",
    "Budget",
    "DtypeCast",
    "Evaluator",
    "Factors",
    "Method",
    "OffsetPlace",
    "Slot",
    "Start",
    "keep_float32",
    "setting_faults",
]

DtypeCast = Callable[[Tensor], Tensor]
"""Rounds a float32 factor to the adapter's storage dtype and back to float32."""


def keep_float32(factor: Tensor) -> Tensor:
    """The cast of a float32 adapter: nothing is rounded."""
    return factor


OffsetPlace = Literal["none", "adapter", "base"]
"""Where the update of the start is subtracted again, so that step 0 computes what the base model computes."""


class Slot(StrEnum):
    """The five questions of low-rank adaptation."""

    ALLOCATE = "allocate"
    INITIALIZE = "initialize"
    SCALE = "scale"
    OPTIMIZE = "optimize"
    SCHEDULE = "schedule"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the run may spend, said once beside the methods.

    Args:
        r: the reference rank, >= 1.
        lora_alpha: alpha, > 0.
        parameters: the most live lora_A and lora_B parameters, normally those of a uniform rank `r`.
        ranks: by layer name, its rank, where that is decided before calibration; empty where it is not.
    """

    r: int
    lora_alpha: float
    parameters: int
    ranks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Ranks in the order of the layers, with the importance and the reason behind each.

    Args:
        ranks: one a layer, >= 0; 0 drops the layer.
        importance: one a layer, in the allocator's own unit; None if nothing was measured.
        reasons: one a layer, a few words.
        notes: remarks on the whole.
        overspend_allowed: whether the ranks may cost more than the budget, as published rules that keep none do.
    """

    ranks: tuple[int, ...]
    importance: tuple[float, ...] | None
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()
    overspend_allowed: bool = False


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one layer: lora_A [rank, in] and lora_B [out, rank], float32 on the CPU."""

    lora_A: Float[Tensor, "rank in"]  # noqa: N815  (the field's word)
    lora_B: Float[Tensor, "out rank"]  # noqa: N815


class Evaluator(Protocol):
    """The mean loss of the evaluation batches of calibration, with these lora_B values (None: the adapter off)."""

    def __call__(self, lora_B: Mapping[str, Float[Tensor, "out rank"]] | None) -> float:
        """The mean loss, in evaluation mode, reduced over all processes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What one layer starts from.

    Args:
        layer: the base layer (its weight is read, never written).
        rank: the layer's rank, >= 1.
        divisor: alpha / scaling, the scale rank of the layer's scaling rule.
        budget: the run's budget.
        seed: the run's seed; draw with `linalg.random.generator(seed, purpose, layer.name)`.
        dtype_cast: rounds a float32 factor to the adapter's storage dtype and back (identity for float32 adapters).
        statistics: what calibration found, or None if the method asked for nothing.
    """

    layer: LinearLayer
    rank: int
    divisor: float
    budget: Budget
    seed: int
    dtype_cast: DtypeCast
    statistics: LayerStatistics | None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method fills some of the slots; what it does not override is plain LoRA.

    Subclasses are frozen keyword-only dataclasses whose `__post_init__` validates ranges and raises ConfigError.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    slots: ClassVar[frozenset[Slot]]
    learning_rates: ClassVar[tuple[float, float, float]]
    """Recommended learning rates: low end, default, high end; under AdamW, or the method's own optimizer."""
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """Named settings ("paper", "official"): keyword arguments of the dataclass."""
    scaling_rules: ClassVar[frozenset[ScalingRule]] = frozenset(ScalingRule)
    """Rules that the method can run with; a plan under another is refused."""
    unclipped: ClassVar[bool] = False
    """Whether the trainer must not clip gradients, because the method clips what is invariant by itself."""
    leaner: ClassVar[str] = ""
    """What to set where `state_bytes` does not fit, in the user's words ("lora-pro.mode: efficient")."""

    @property
    def needs_validation(self) -> bool:
        """Whether the schedule scores on validation batches, which `attach` must then be given."""
        return False

    @property
    def scored_rows(self) -> int:
        """How many validation rows the schedule scores on over the run; only asked where `needs_validation` is true."""
        return 32

    @property
    def offset_place(self) -> OffsetPlace:
        """Where the start's update is subtracted (initialize slot): nowhere, beside the adapter, or from the base."""
        return "none"

    @property
    def writes_base(self) -> tuple[str, str] | None:
        """The setting by which base weights are written while training lasts, and the one that leaves them alone.

        ("offset: base", "offset: adapter"); None where nothing writes them. `attach` hashes the weights first, and the
        session gives them back when it is closed.
        """
        return None

    def request(
        self, layers: Sequence[LayerShape], budget: Budget, seed: int, *, dtype_cast: DtypeCast = keep_float32
    ) -> StatisticsRequest | None:
        """What the method needs to know of the gradients; None if nothing.

        Args:
            layers: the targets, in their order.
            budget: the run's budget.
            seed: the run's seed.
            dtype_cast: the rounding of `Start.dtype_cast`: projections are taken on the factor as it is stored.
        """
        return None

    def live_budget(self, budget: Budget) -> Budget:
        """The budget as what is trained at once sees it: the run's, or one with another alpha (allocate slot)."""
        return budget

    def export_budget(self, budget: int) -> int | None:
        """The most lora_A and lora_B parameters of an export whose training may leave more; None for all (schedule).

        Args:
            budget: the plan's, normally those of a uniform rank `r`.
        """
        return None

    def allocate(
        self, layers: Sequence[LayerShape], budget: Budget, statistics: GradientStatistics | None
    ) -> Allocation:
        """Ranks for the layers (allocate slot)."""
        raise NotImplementedError(f"{self.id} does not fill the allocate slot")

    def scaling_rule(self) -> ScalingRule:
        """The scaling rule (scale slot)."""
        raise NotImplementedError(f"{self.id} does not fill the scale slot")

    def check_ranks(self, layers: Sequence[LayerShape], ranks: Sequence[int]) -> None:
        """Refuses ranks that the method cannot work with, as soon as they are known; all layers have one or more.

        Raises:
            ConfigError: with every such layer.
        """

    def initialize(self, start: Start) -> Factors:
        """The factors at step 0 (initialize slot)."""
        raise NotImplementedError(f"{self.id} does not fill the initialize slot")

    def start_notes(
        self, statistics: GradientStatistics | None, start: Mapping[str, Factors], seed: int
    ) -> tuple[str, ...]:
        """What the user should be told of the factors at step 0, one sentence each (initialize slot)."""
        return ()

    def refine(self, start: Mapping[str, Factors], evaluate: Evaluator) -> Mapping[str, Factors] | None:
        """New lora_B values found by evaluating batches on the attached, untrained model; None to keep them."""
        return None

    def make_optimizer(self, groups: Sequence[dict[str, Any]], *, lr: float) -> Optimizer:
        """The optimizer of the run (optimize slot).

        Args:
            groups: parameter groups: `{"kind": "lora_pair", "params": [A1, B1, A2, B2, ...], "scaling": [s1, s2, ...],
                "weight_decay": ...}` and `{"kind": "plain", "params": [...], "weight_decay": ...}` (AdamW); both
                may hold `betas`, and plain ones `eps`.
            lr: the learning rate of groups without their own.
        """
        raise NotImplementedError(f"{self.id} does not fill the optimize slot")

    def state_bytes(self, ranks: Mapping[LayerShape, int]) -> int | None:
        """Bytes of optimizer state over these layers, where they need a look before the first step (optimize slot).

        Args:
            ranks: by layer, its rank.

        Returns:
            The bytes, held against the free memory; None for no more than AdamW's two moments.
        """
        return None

    def capacity(self, layers: Sequence[LayerShape], ranks: Mapping[str, int]) -> dict[str, int]:
        """The slots that each layer's adapter is built with, where ranks may grow in training (schedule slot).

        Slots beyond a layer's rank start empty (zero rows of lora_A), and its scaling stays that of its rank.

        Args:
            layers: the targets.
            ranks: by layer, the rank that it starts with, >= 0.

        Returns:
            By layer, at least its rank; 0 where the rank is 0, which drops the layer.
        """
        return dict(ranks)

    def for_epochs_of(self, steps: int) -> "Method":
        """The method with an epoch's length in optimizer steps, where its settings count in epochs; else itself."""
        return self

    def make_schedule(self, scene: Scene) -> Schedule:
        """What acts around steps (schedule slot); hooks are put on the model here and taken off by its `close`."""
        raise NotImplementedError(f"{self.id} does not fill the schedule slot")

    def notes(self, ranks: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
        """What the user should be told beside a plan with these ranks, one sentence each."""
        return ()


def setting_faults(
    method: Method,
    *,
    choices: Mapping[str, Sequence[object]],
    numbers: Mapping[str, float],
    wholes: Mapping[str, int],
    flags: Sequence[str] = (),
) -> list[str]:
    """One message for each setting that cannot be used: the value seen and what is allowed.

    Args:
        method: the method whose settings are checked.
        choices: by setting, the allowed values; the nearest is told.
        numbers: by setting, the least finite number allowed.
        wholes: by setting, the least whole number allowed; None is allowed where it is the default.
        flags: settings that are true or false.
    """
    faults = []
    for key, allowed in choices.items():
        value = getattr(method, key)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in allowed], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            faults.append(f"{method.id}.{key}: {value!r} is not known{hint}; use one of {', '.join(map(str, allowed))}")
    for key, low in numbers.items():
        value = getattr(method, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < math.inf:
            faults.append(f"{method.id}.{key}: {value!r} is out of range; use a finite number >= {low:g}")
    for key, low in wholes.items():
        value, optional = getattr(method, key), getattr(type(method), key, 0) is None
        if not (value is None and optional) and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            faults.append(f"{method.id}.{key}: {value!r} is out of range; use a whole number >= {low}")
    for key in flags:
        if not isinstance(getattr(method, key), bool):
            faults.append(f"{method.id}.{key}: {getattr(method, key)!r} is not a flag; use true or false")
    return faults
