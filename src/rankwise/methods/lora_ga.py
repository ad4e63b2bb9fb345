"""LoRA-GA: lora_A and lora_B from the singular vectors of the gradient, and an offset that undoes them at step 0.

"LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000 (NeurIPS 2024),
Shaowen Wang, Linxi Yu, Jian Li.

The idea: LoRA is slow to start because its first update s (dB A + B dA) is badly aligned with the gradient G of the
full weight. Take A and B from different halves of the 2r leading singular vectors of G, and the first step of gradient
descent moves the weight along the best rank-2r approximation of G. The update s B A of the start is subtracted again,
so that the model is unchanged at step 0, and the factors' size ("stable output") depends on the layer's width only.

| paper and code | here |
|---|---|
| directions ArB2r, A2rBr, ArBr, random | `directions` |
| randomized SVD of G, q = min(4r, out, in), 4 iterations | `linalg.spectrum.truncated_svd` |
| scales stable, gd, unit, weightS | `gain`, `weight_gain` |
| norm clipping | `clip_ratio` |
| W - s B0 A0 | `LoRAGA.offset_place`; `adapters.offset` acts, `export.fold` folds |
| first-step direction M = B B^T G + G A^T A | `gradient_sketch.missed_energy` |
| PEFT's own variant | `peft_factors` |

The full text could not be obtained: formulas are those of the authors' code, Outsider565/LoRA-GA 89af7de.

Departures, from the code (C):
- C: the offset stands beside the adapter by default: exact on 16-bit and quantized bases, which are never written. With
  lora_dropout the model is unchanged at step 0 in evaluation mode only, as the offset sees the input without dropout.
- C: a layer with 2r > min(out, in) is refused with its name, or capped when asked; the code fails on a shape.
- C: both factors take out^(1/4), as the fork does; the older scripts took in^(1/4) for A.
- C: signs of singular vectors are fixed and draws come from a generator of the layer, so that a run can be repeated.
- C: a layer without gradient starts as plain LoRA, with a note.
- C: `statistics: sketch` needs no full gradient: 2r + 8 products a side, one more reading of the batches for each
  power iteration.
- PEFT's `init_lora_weights="lora_ga"` is another method (B times the singular values, `random` with the same indices
  on both sides): `variant: peft`, for comparison only.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rankwise.calibration.statistics import GradientStatistics, LayerStatistics, StatisticsRequest
from rankwise.errors import CalibrationError, ConfigError
from rankwise.linalg.random import generator, kaiming_uniform
from rankwise.linalg.spectrum import truncated_svd
from rankwise.methods.base import (
    Budget,
    DtypeCast,
    Factors,
    Method,
    OffsetPlace,
    Slot,
    Start,
    keep_float32,
    setting_faults,
)
from rankwise.methods.gradient_sketch import Sketch, missed_energy
from rankwise.ranks.shapes import LayerShape

__all__ = ["LoRAGA"]

logger = logging.getLogger(__name__)

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "gd", "unit", "weightS"]
Triples = tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]

EXACT_UP_TO = 2**30
"""Target parameters up to which `statistics: auto` keeps whole gradients (4 GiB in float32)."""
_NAMED_LAYERS = 32

_CHOICES: Mapping[str, Sequence[str]] = {
    "direction": get_args(Direction),
    "scale": get_args(Scale),
    "offset": get_args(OffsetPlace),
    "on_small": ("error", "cap"),
    "statistics": ("auto", "exact", "sketch"),
    "variant": ("official", "peft"),
}


@dataclass(frozen=True, kw_only=True)
class LoRAGA(Method):
    """Starts from the gradient's singular vectors; the update of the start is subtracted by an offset.

    Args:
        direction: which of the 2r leading singular vectors go to A and B (code: ArB2r, the first r and the next r).
        scale: their size: `stable` by width, `gd` 1 / scaling, `unit` 1, `weightS` by the singular values of W.
        stable_gamma: gamma of `stable`, > 0; larger is smaller (code: 16; 64 in older runs).
        norm_clip: shrink factors whose update exceeds the largest weight.
        offset: where the start is subtracted: `adapter` (the base is untouched), `base` (W is rewritten, as in the
            code) or `none` (the model at step 0 is another: for experiments).
        on_small: what to do where 2 * rank is above a layer's size: `error`, or `cap` (as many directions as there are;
            the other ranks start as plain LoRA's).
        statistics: `exact` keeps whole gradients, `sketch` a few products; `auto` is exact up to 2**30 parameters.
        power_iterations: readings of the batches after the first, each multiplies the sketch by G or its transpose once
            more, >= 0; 0 is the one-pass sketch.
        variant: `official`, or `peft` (PEFT's own variant, for comparison only).
    """

    id: ClassVar[str] = "lora-ga"
    title: ClassVar[str] = "LoRA-GA: Low-Rank Adaptation with Gradient Approximation"
    source: ClassVar[str] = "arXiv:2407.05000"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.INITIALIZE})
    learning_rates: ClassVar[tuple[float, float, float]] = (5e-6, 2e-5, 2e-4)
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "official": {
            "direction": "ArB2r",
            "scale": "stable",
            "stable_gamma": 16.0,
            "offset": "base",
            "statistics": "exact",
        },
    }

    direction: Direction = "ArB2r"
    scale: Scale = "stable"
    stable_gamma: float = 16.0
    norm_clip: bool = False
    offset: OffsetPlace = "adapter"
    on_small: Literal["error", "cap"] = "error"
    statistics: Literal["auto", "exact", "sketch"] = "auto"
    power_iterations: int = 1
    variant: Literal["official", "peft"] = "official"

    def __post_init__(self) -> None:
        faults = setting_faults(
            self,
            choices=_CHOICES,
            numbers={"stable_gamma": 1e-6},
            wholes={"power_iterations": 0},
            flags=("norm_clip",),
        )
        if not faults and self.variant == "peft" and self.norm_clip:
            faults.append("lora-ga.norm_clip: PEFT's variant has no norm clipping; use variant: official or false")
        if faults:
            raise ConfigError(faults)

    # --- slots ---------------------------------------------------------------------------------------------------

    @property
    def offset_place(self) -> OffsetPlace:
        """Where the start's update is subtracted."""
        return self.offset

    @property
    def writes_base(self) -> tuple[str, str] | None:
        """Under `base` the start is subtracted from the weights themselves."""
        return ("offset: base", "offset: adapter") if self.offset == "base" else None

    def request(
        self, layers: Sequence[LayerShape], budget: Budget, seed: int, *, dtype_cast: DtypeCast = keep_float32
    ) -> StatisticsRequest:
        """The whole gradient, or the products of its sketch."""
        if self._exact(layers):
            return StatisticsRequest(gradient=True, identity="lora-ga exact")
        return Sketch(self.power_iterations, seed).request(budget.r, budget.ranks)

    def check_ranks(self, layers: Sequence[LayerShape], ranks: Sequence[int]) -> None:
        """Refuses layers that have fewer than 2r singular vectors, unless they may be capped.

        Raises:
            ConfigError: with every such layer.
        """
        small = [] if self.on_small == "cap" else [_too_small(s, r) for s, r in zip(layers, ranks, strict=True)]
        faults = [fault for fault in small if fault is not None]
        if faults:
            raise ConfigError(faults)

    def initialize(self, start: Start) -> Factors:
        """A and B from the 2r leading singular vectors of G, scaled; plain LoRA's start without a gradient.

        Raises:
            ConfigError: if 2r is above the layer's size (and `on_small` does not cap), or above what the sketch kept.
            CalibrationError: if the statistics are missing or not finite.
        """
        shape, rank, found = start.layer.shape, start.rank, start.statistics
        if found is None:
            raise CalibrationError(f"layer {shape.name}: lora-ga starts from gradient statistics, and there are none")
        has_gradient = _has_gradient(found)
        self.check_ranks([shape], [rank])
        count = min(rank, shape.max_rank // 2)
        lora_A = kaiming_uniform(rank, shape.in_features, generator(start.seed, "lora_A", shape.name))
        lora_B = torch.zeros(shape.out_features, rank)
        if has_gradient and count:
            triples = self._triples(start, found, 2 * count)
            first_A, first_B = self._factors(start, triples, count)
            lora_A[:count], lora_B[:, :count] = first_A.cpu(), first_B.cpu()
        return Factors(start.dtype_cast(lora_A), start.dtype_cast(lora_B))

    def start_notes(
        self, statistics: GradientStatistics | None, start: Mapping[str, Factors], seed: int
    ) -> tuple[str, ...]:
        """How much of the gradient the first step misses, in all and by layer, and which layers start otherwise."""
        if statistics is None:
            return ()
        plain = [name for name, factors in start.items() if not factors.lora_B.any()]
        small = [name for name in plain if statistics.layers[name].shape.max_rank < 2]
        without = [name for name in plain if name not in small]
        live = {name: factors for name, factors in start.items() if name not in plain}
        capped = [name for name, factors in live.items() if not factors.lora_B.any(0).all()]
        told: tuple[str, ...] = ()
        if live and self.variant == "official":  # the direction is that of unit vectors, which PEFT's B is not
            found = {name: statistics.layers[name] for name in live}
            exact = all(layer.gradient is not None for layer in found.values())
            energies = {name: self._missed(found[name], factors, seed) for name, factors in live.items()}
            told += _error_notes(energies, None if exact else self.power_iterations)
        if without:
            told += (f"lora-ga: warning: no gradient in {_few(without)}: started as plain LoRA, without an offset",)
        if small:
            told += (
                f"lora-ga: a single singular vector in {_few(small)}, and A and B need one each: started as plain "
                "LoRA, without an offset",
            )
        if capped:
            told += (
                f"lora-ga: too few singular vectors for 2r in {_few(capped)}: the ranks beyond started as plain LoRA",
            )
        return told

    # --- what the slots share -------------------------------------------------------------------------------------

    def _exact(self, layers: Sequence[LayerShape]) -> bool:
        """Decided by size alone: the free memory of the moment would ask another question at the next start."""
        size = sum(layer.out_features * layer.in_features for layer in layers)
        return self.statistics == "exact" or (self.statistics == "auto" and size <= EXACT_UP_TO)

    def _missed(self, found: LayerStatistics, factors: Factors, seed: int) -> tuple[float, float]:
        if found.gradient is not None:
            return missed_energy(found.gradient, factors)
        return Sketch(self.power_iterations, seed).missed_energy(found, factors)

    def _triples(self, start: Start, found: LayerStatistics, count: int) -> Triples:
        """The `count` leading singular triples of G, from itself or from its sketch."""
        if found.gradient is not None:
            gradient = found.gradient.to(start.layer.device)
            source = generator(start.seed, "lora_ga_svd", found.shape.name)
            # q = min(4r, out, in), 4 iterations (authors' code)
            return truncated_svd(gradient, count, generator=source, oversample=count, power_iterations=4)
        U, S, Vh = Sketch(self.power_iterations, start.seed).triples(found)
        if count > len(S):
            raise ConfigError(
                f"layer {found.shape.name}: rank {start.rank} in the plan needs {count} singular vectors, and the "
                f"sketch for r = {start.budget.r} kept {len(S)}; use lora-ga.statistics: exact, or a plan closer to r"
            )
        return U[:, :count], S[:count], Vh[:count]

    def _factors(
        self, start: Start, triples: Triples, count: int
    ) -> tuple[Float[Tensor, "k in"], Float[Tensor, "out k"]]:
        U, S, Vh = triples
        name, scaling = start.layer.name, start.budget.lora_alpha / start.divisor
        for_A, for_B = directions(self.direction, count, generator(start.seed, "lora_ga_direction", name))
        weight = start.layer.weight().to(U.device) if self.norm_clip or self.scale == "weightS" else None
        source = generator(start.seed, "lora_ga_weight", name)
        if self.variant == "peft":
            for_B = for_A if self.direction == "random" else for_B
            largest = None if weight is None else _leading_values(weight, 1, source)[0]
            # PEFT reads the output features off the stored weight, which Conv1D holds transposed.
            rows = start.layer.shape.in_features if start.layer.kind == "conv1d" else start.layer.shape.out_features
            return peft_factors(
                Vh[for_A], U[:, for_B], S[for_B], self.scale, rows, self.stable_gamma, scaling, largest=largest
            )
        if self.scale == "weightS":
            assert weight is not None
            rank = min(start.rank, start.layer.shape.max_rank)
            factor = weight_gain(_leading_values(weight, rank, source), scaling)
        else:
            factor = gain(self.scale, start.layer.shape.out_features, self.stable_gamma, scaling)
        lora_A, lora_B = factor * Vh[for_A], factor * U[:, for_B]
        if self.norm_clip:
            assert weight is not None
            root = clip_ratio(weight, lora_A, lora_B, scaling) ** 0.5
            lora_A, lora_B = root * lora_A, root * lora_B
        return lora_A, lora_B


# --- equations ----------------------------------------------------------------------------------------------------


def directions(direction: Direction, rank: int, source: torch.Generator) -> tuple[Int[Tensor, " r"], Int[Tensor, " r"]]:
    """Which of the 2r leading singular vectors go to A and to B, counted from 0.

    Source: Outsider565/LoRA-GA 89af7de, `lora_ga_init`; there `random` draws both from one permutation.
    """
    first, second = torch.arange(rank), torch.arange(rank, 2 * rank)
    if direction == "ArB2r":
        return first, second
    if direction == "A2rBr":
        return second, first
    if direction == "ArBr":
        return 2 * first + 1, 2 * first
    drawn = torch.randperm(2 * rank, generator=source)
    return drawn[:rank], drawn[rank:]


def gain(scale: Scale, out_features: int, stable_gamma: float, scaling: float) -> float:
    """What unit vectors are multiplied by, on both sides: out^(1/4) / sqrt(gamma), 1 / s, or 1.

    Source: Outsider565/LoRA-GA 89af7de, `lora_ga_init`.
    """
    if scale == "stable":
        return float(out_features**0.25 / stable_gamma**0.5)
    return 1.0 / scaling if scale == "gd" else 1.0


def weight_gain(singular_values: Float[Tensor, " r"], scaling: float) -> float:
    """The mean of sqrt(sigma_j(W) / s) over the r leading singular values of W.

    Source: Outsider565/LoRA-GA 89af7de, `lora_ga_init`, scale `weightS`.
    """
    return float((singular_values / scaling).sqrt().mean())


def _leading_values(weight: Float[Tensor, "out in"], rank: int, source: torch.Generator) -> Float[Tensor, " r"]:
    """The leading singular values of W, whose spectrum is flat: more columns and iterations than for G."""
    return truncated_svd(weight, rank, generator=source, oversample=16 + rank, power_iterations=8)[1]


def clip_ratio(
    weight: Float[Tensor, "out in"], lora_A: Float[Tensor, "r in"], lora_B: Float[Tensor, "out r"], scaling: float
) -> float:
    """What the update is multiplied by so that no entry of s B A is above the largest weight; at most 1.

    Source: Outsider565/LoRA-GA 89af7de, `norm_clip`.
    """
    largest = float((scaling * (lora_B @ lora_A)).abs().max())
    return min(1.0, float(weight.abs().max()) / largest) if largest > 0 else 1.0


def peft_factors(
    rows: Float[Tensor, "r in"],
    columns: Float[Tensor, "out r"],
    singular_values: Float[Tensor, " r"],
    scale: Scale,
    out_features: int,
    stable_gamma: float,
    scaling: float,
    *,
    largest: Float[Tensor, ""] | None,
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """PEFT's variant: B times the singular values of G under every scale; `stable` and `weightS` scale B alone.

    Args:
        rows: singular vectors for A.
        columns: singular vectors for B.
        singular_values: of G, those of `columns`.
        scale: ours; PEFT says gd_scale and weight_svd.
        out_features: of `stable`.
        stable_gamma: of `stable`.
        scaling: s.
        largest: the largest singular value of W, for `weightS`.

    Source: PEFT 0.21, `lora_ga_init`.
    """
    scaled = columns * singular_values
    if scale == "gd":
        return rows / scaling, scaled / scaling
    if scale == "weightS" and largest is not None and singular_values[0] > 0:
        scaled = scaled * (largest / singular_values[0])
    return rows, scaled * gain("stable", out_features, stable_gamma, scaling) if scale == "stable" else scaled


# --- checks and words ---------------------------------------------------------------------------------------------


def _has_gradient(found: LayerStatistics) -> bool:
    """Whether anything that is kept of the layer's gradient differs from zero.

    The norm reads a gradient once and makes nothing; only where it overflows or vanishes are the entries looked at.

    Raises:
        CalibrationError: if it is not finite.
    """
    every = (found.gradient, found.projection, found.left_projection)
    kept = [(tensor, torch.linalg.vector_norm(tensor)) for tensor in every if tensor is not None]
    if any(not norm.isfinite() and not tensor.isfinite().all() for tensor, norm in kept):
        raise CalibrationError(
            f"layer {found.shape.name}: the mean gradient is not finite; look for overflow in the loss"
        )
    return found.batches > 0 and (not kept or any(bool(norm > 0) or bool(tensor.any()) for tensor, norm in kept))


def _too_small(shape: LayerShape, rank: int) -> str | None:
    if 2 * rank <= shape.max_rank:
        return None
    lower = f"lower r to {shape.max_rank // 2}, " if shape.max_rank > 1 else ""
    return (
        f"lora-ga: layer {shape.name} ({shape.out_features} x {shape.in_features}) has {shape.max_rank} singular "
        f"vectors, and rank {rank} takes {2 * rank}: {lower}leave the layer out with exclude_modules, or set "
        "lora-ga.on_small: cap"
    )


def _error_notes(energies: Mapping[str, tuple[float, float]], power_iterations: int | None) -> tuple[str, ...]:
    """The relative error of the first step's direction, in all and by layer; None: from whole gradients."""
    errors = {name: (missed / whole) ** 0.5 if whole > 0 else 0.0 for name, (missed, whole) in energies.items()}
    missed, whole = (sum(pair[side] for pair in energies.values()) for side in (0, 1))
    total = (missed / whole) ** 0.5 if whole > 0 else 0.0
    source = "whole gradients"
    if power_iterations is not None:
        readings = "1 reading" if power_iterations == 0 else f"{power_iterations + 1} readings"
        source = f"a sketch of {readings}, estimated to about 10 % a layer on products held out of it"
    for name, error in errors.items():
        logger.info("lora-ga: %s: relative error %.3f", name, error)
    if len(errors) <= _NAMED_LAYERS:
        by_layer = ", ".join(f"{name} {error:.2f}" for name, error in errors.items())
    else:
        kinds: dict[str, list[float]] = {}
        for name, error in errors.items():
            kinds.setdefault(name.rpartition(".")[2], []).append(error)
        by_layer = ", ".join(f"{kind} {min(found):.2f} to {max(found):.2f}" for kind, found in kinds.items())
        by_layer += " (each layer's is logged)"
    return (
        f"lora-ga: the first step's direction has a relative error of {total:.2f} against the gradient ({source})",
        f"lora-ga: that error by layer: {by_layer}",
    )


def _few(names: Sequence[str]) -> str:
    listed = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return f"layer {listed}" if len(names) == 1 else f"{len(names)} layers ({listed})"
