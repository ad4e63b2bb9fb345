"""GoRA: ranks and lora_B from the gradient of the full weights, before training.

"GoRA: Gradient-driven Adaptive Low Rank Adaptation", arXiv 2502.12171v3 (NeurIPS 2025).

The idea: average the gradient G of each weight W over a few batches. The mean of |W * G| splits the parameter budget
into one rank a layer. lora_B starts so that the update is -gamma * sqrt(in/r) * G projected on the row space of the
random lora_A, which is one step of gradient descent of the rate gamma, in norm; the base weights are never touched.

| paper | here |
|---|---|
| eq. 5, importance mean abs(W * G), and the kinds of the authors' code | `mean_absolute_product`, `importance_of` |
| normalized importance, softmax option | `sum_shares`, `softmax_shares` |
| budget and ranks, nearest rounding | `paper_ranks` |
| budget and ranks of the authors' code | `official_ranks` |
| random A (the paper's transposed A0) | `draw_factor`, `singular_rows` |
| eq. 9, B = -G A^+ | `descent_direction` |
| eq. 10, xi = gamma sqrt(in) / alpha | `gain` |
| adaptive number of batches (v3 code) | `has_converged`, `StopRule` |
| adaptive gamma (v3 code) | `GAMMA_CANDIDATES`, `GoRA.refine` |

The full text could not be obtained: equation numbers are quoted from secondary sources and cross-checked with the
authors' code, hhnqqq/MyTransformers, at 724935c, aac1b21 and 4037d4d.

Departures, from the paper (P) or from the code (C):
- C: B has the minus sign. The code lost it in 321fe07 and ascends since.
- P, C: `rank_mode: exact` is the default: neither published rule keeps the parameter budget (0.81 to 1.15 of it).
- C: ranks are capped by min(in, out) in every mode; the code gave a 17 x 33 layer rank 84.
- C: phi defaults to the paper's square root, importance to the paper's union_mean, not the parser's Frobenius norm.
- C: B by QR of A^T, not by pinv(A A^T + 1e-8 I), which loses all digits as the rank nears in.
- C: softmax over equal importances is uniform; the code divides by the range and follows noise.
- C: a layer without gradient gets r_min and B = 0 in `exact` and `paper`, whatever the normalization.
- C: adaptive gamma compares with the adapter off and asks for an improvement above float noise.
- C: the preset `official` sets what belongs to the method. The code's N = 32 batches and its plain mean over them
  belong to calibration (`max_batches=32, token_weighted=False`; the defaults are 64 and a mean over label tokens).
- C: initialization methods that edit W are left out (only lora_A may come from an SVD), and so are gradients along an
  AdaLomo trajectory.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.calibration.statistics import GradientStatistics, LayerStatistics, StatisticsRequest
from rankwise.errors import BudgetError, CalibrationError, ConfigError
from rankwise.linalg.factors import regress_dense_on_rows, regress_on_rows
from rankwise.linalg.random import generator
from rankwise.methods.base import (
    Allocation,
    Budget,
    DtypeCast,
    Evaluator,
    Factors,
    Method,
    Slot,
    Start,
    keep_float32,
    setting_faults,
)
from rankwise.methods.draws import Initialization, draw_factor, singular_rows
from rankwise.methods.importance import (
    ROW_MEANS,
    Importance,
    StopRule,
    has_gradient,
    importance_of,
    measured_importance,
    rooted,
    softmax_shares,
    sum_shares,
)
from rankwise.ranks.allocation import water_fill
from rankwise.ranks.shapes import LayerShape, ScalingRule

__all__ = ["GAMMA_CANDIDATES", "GoRA"]

logger = logging.getLogger(__name__)

Phi = Literal["sqrt", "linear", "log1p"]
RankMode = Literal["exact", "paper", "official"]
Rounding = Literal["moderate", "radical", "conserved"]

_PHI: Mapping[str, Callable[[float], float]] = {"sqrt": math.sqrt, "linear": lambda cost: cost, "log1p": math.log1p}
_ROUND: Mapping[str, Callable[[float], int]] = {"moderate": round, "radical": math.ceil, "conserved": math.floor}
_LOSS_NOISE = 1e-6  # the relative change of a float32 loss that is rounding alone
GAMMA_CANDIDATES: tuple[float, ...] = tuple(0.8**k for k in range(52))  # down to 1.14e-5, the last above 1e-5

_CHOICES: Mapping[str, Sequence[str]] = {
    "importance": get_args(Importance),
    "normalization": ("sum", "softmax"),
    "rank_mode": get_args(RankMode),
    "rounding": get_args(Rounding),
    "phi": get_args(Phi),
    "scaling": ("dynamic", "average"),
    "initialization": get_args(Initialization),
    "convergence_floor": ("relative", "absolute"),
}


@dataclass(frozen=True, kw_only=True)
class GoRA(Method):
    """Ranks from mean |W * G| and a lora_B that makes the start one step of gradient descent.

    Args:
        gamma: the rate of that step, >= 0; 0 starts as plain LoRA (paper: 5e-2, and 8e-2 on MetaMath).
        r_min: least rank of a layer, >= 0; None: half of `r`, at least 1. 0 lets layers be dropped.
        r_max: largest rank of a layer; None: 4 * `r`.
        importance: what is measured of W and G in each layer (paper: union_mean).
        scale_importance: take the square root of the importance.
        normalization: `sum` divides by the total, `softmax` sharpens or flattens by `temperature`.
        temperature: of the softmax, > 0 (code: 0.5).
        rank_mode: `exact` keeps the parameter budget; `paper` and `official` are the published rules, which do not.
        rounding: of `official`: moderate (nearest), radical (up) or conserved (down).
        phi: the smoothing of a layer's size (paper: sqrt; the released runs: linear).
        scaling: `dynamic` divides alpha by the layer's own rank, `average` by `r`.
        rank_stabilized: divide by the square root instead (authors' setting).
        initialization: how lora_A starts.
        scale_by_lr: False: B = B* stable_gamma / alpha, the code's older rule.
        stable_gamma: of that rule, >= 0 (code: 0.02).
        adaptive_batches: stop calibration once every importance has settled.
        min_batches: batches before it may stop, >= 2.
        convergence_threshold: largest relative change of a settled importance, > 0.
        convergence_floor: keeps that ratio finite: `relative`, 1e-3 of the mean; `absolute`, the code's 1e-8.
        adaptive_gamma: choose gamma among 52 candidates by the loss of calibration batches.
    """

    id: ClassVar[str] = "gora"
    title: ClassVar[str] = "GoRA: Gradient-driven Adaptive Low Rank Adaptation"
    source: ClassVar[str] = "arXiv:2502.12171v3"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.ALLOCATE, Slot.INITIALIZE, Slot.SCALE})
    learning_rates: ClassVar[tuple[float, float, float]] = (2e-5, 1e-4, 5e-4)
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {"rank_mode": "paper", "phi": "sqrt", "gamma": 5e-2},
        "official": {
            "rank_mode": "official",
            "rounding": "moderate",
            "phi": "linear",
            "gamma": 5e-2,
            "convergence_floor": "absolute",
        },
    }

    gamma: float = 5e-2
    r_min: int | None = None
    r_max: int | None = None
    importance: Importance = "union_mean"
    scale_importance: bool = False
    normalization: Literal["sum", "softmax"] = "sum"
    temperature: float = 0.5
    rank_mode: RankMode = "exact"
    rounding: Rounding = "moderate"
    phi: Phi = "sqrt"
    scaling: Literal["dynamic", "average"] = "dynamic"
    rank_stabilized: bool = True
    initialization: Initialization = "kaiming"
    scale_by_lr: bool = True
    stable_gamma: float = 0.02
    adaptive_batches: bool = False
    min_batches: int = 3
    convergence_threshold: float = 0.1
    convergence_floor: Literal["relative", "absolute"] = "relative"
    adaptive_gamma: bool = False

    def __post_init__(self) -> None:
        faults = setting_faults(
            self,
            choices=_CHOICES,
            numbers={"gamma": 0, "stable_gamma": 0, "temperature": 1e-6, "convergence_threshold": 0},
            wholes={"min_batches": 2, "r_min": 0, "r_max": 1},
            flags=("scale_importance", "rank_stabilized", "scale_by_lr", "adaptive_batches", "adaptive_gamma"),
        )
        low, high = self.r_min, self.r_max
        if not faults and low is not None and high is not None and low > high:
            faults.append(f"gora.r_min: {low} is above gora.r_max: {high}; lower r_min or raise r_max")
        if not faults and self.adaptive_gamma and not (self.scale_by_lr and self.gamma > 0):
            faults.append(
                "gora.adaptive_gamma: the search scales B by gamma, so it needs scale_by_lr: true and gamma > 0"
            )
        if faults:
            raise ConfigError(faults)

    # --- slots ---------------------------------------------------------------------------------------------------

    def request(
        self, layers: Sequence[LayerShape], budget: Budget, seed: int, *, dtype_cast: DtypeCast = keep_float32
    ) -> StatisticsRequest:
        """Importance of every layer and G A^T for as many rows of A as a layer can get; G itself for an SVD start."""
        self.bounds(budget)
        from_svd = self.initialization in ("weight_svd", "grad_svd")
        settling = (self.min_batches, self.convergence_threshold, self.convergence_floor)
        settings = (self.importance, self.initialization, self._estimate_rank(budget), self._cap(budget), seed)
        probe = dtype_cast(torch.tensor([1.0 / 3.0])).item()  # tells one storage dtype from another
        return StatisticsRequest(
            gradient=from_svd,
            projection=None
            if from_svd
            else (lambda shape: self._drawn(shape, self._drawn_rows(shape, budget), seed, dtype_cast)),
            score=lambda weight, gradient: importance_of(
                self.importance, weight, gradient, self._estimate_rank(budget), generator(seed, "importance")
            ),
            score_is_row_mean=self.importance in ROW_MEANS,
            stop=StopRule(*settling) if self.adaptive_batches else None,
            identity=f"gora {settings} {settling if self.adaptive_batches else None} {probe!r}",
        )

    def allocate(
        self, layers: Sequence[LayerShape], budget: Budget, statistics: GradientStatistics | None
    ) -> Allocation:
        """Ranks in proportion to the importance of each layer.

        Raises:
            BudgetError: if r_min in every layer is above the budget (`exact`).
            CalibrationError: if statistics are missing or an importance is not finite; the layers are named.
        """
        r_min, r_max = self.bounds(budget)
        shares, notes = self._shares(layers, statistics)
        if self.rank_mode == "exact":
            sizes = [_PHI[self.phi](layer.cost) for layer in layers]
            wished = [share / size for share, size in zip(shares, sizes, strict=True)]
            ranks = _fill(wished, layers, budget, r_min, r_max)
        elif self.rank_mode == "paper":
            ranks = paper_ranks(shares, layers, budget.r, phi=self.phi, r_min=r_min, r_max=r_max)
        else:
            raw = official_ranks(
                shares, layers, budget.r, phi=self.phi, rounding=self.rounding, r_min=r_min, r_max=r_max
            )
            ranks = tuple(max(0, min(int(rank), layer.max_rank)) for rank, layer in zip(raw, layers, strict=True))
        spent = sum(rank * layer.cost for rank, layer in zip(ranks, layers, strict=True))
        reasons = tuple(
            _reason(rank, share, layer, r_min, r_max) + _sampling_error(layer, statistics)
            for rank, share, layer in zip(ranks, shares, layers, strict=True)
        )
        return Allocation(
            ranks=ranks,
            importance=tuple(shares),
            reasons=reasons,
            notes=(*_summary(ranks, layers, spent, budget, r_min, r_max), *notes),
            overspend_allowed=self.rank_mode != "exact",
        )

    def scaling_rule(self) -> ScalingRule:
        """Alpha over the (root of the) layer's own rank, or over that of r."""
        if self.scaling == "dynamic":
            return ScalingRule.ALPHA_OVER_SQRT_RANK if self.rank_stabilized else ScalingRule.ALPHA_OVER_RANK
        return ScalingRule.ALPHA_OVER_SQRT_R if self.rank_stabilized else ScalingRule.ALPHA_OVER_R

    def initialize(self, start: Start) -> Factors:
        """A as drawn before calibration, rounded to its storage dtype, and B against that A (section 3.8).

        A layer without gradient starts with B = 0, and from a Kaiming A where an SVD of zeros was asked for.

        Raises:
            CalibrationError: if the statistics are missing, not finite, or hold fewer projected rows than the rank.
        """
        shape, found = start.layer.shape, start.statistics
        factor = gain(self.gamma, shape.in_features, start.rank, start.divisor, start.budget.lora_alpha)
        if not self.scale_by_lr:
            factor = self.stable_gamma / start.budget.lora_alpha
        if found is None and (factor != 0 or self.initialization == "grad_svd"):
            raise CalibrationError(f"layer {shape.name}: gora starts from gradient statistics, and there are none")
        lora_A = self._start_factor(start)
        if found is None or factor == 0 or not has_gradient(found):
            return Factors(lora_A, torch.zeros(shape.out_features, start.rank))
        return Factors(lora_A, factor * descent_direction(found, lora_A))

    def refine(self, start: Mapping[str, Factors], evaluate: Evaluator) -> Mapping[str, Factors] | None:
        """One gamma for all layers, the one of the 52 candidates with the lowest loss (adaptive gamma).

        B is written from the factors of `start`, never multiplied and divided in place. Ties keep the larger gamma;
        where no candidate beats the loss without adapter by more than float noise, gamma is 0 and B starts at zero.

        Raises:
            CalibrationError: if the loss without adapter is not finite.
        """
        if not self.adaptive_gamma:
            return None
        base = evaluate(None)
        if not math.isfinite(base):
            raise CalibrationError(
                f"gora.adaptive_gamma: the loss without adapter is {base}; "
                "look for empty labels or overflow in the base model"
            )
        best_gamma, best_loss = 0.0, base - _LOSS_NOISE * abs(base)
        for gamma in GAMMA_CANDIDATES:
            loss = evaluate({name: factors.lora_B * (gamma / self.gamma) for name, factors in start.items()})
            if math.isfinite(loss) and loss < best_loss:
                best_gamma, best_loss = gamma, loss
        logger.info("gora: adaptive gamma chose %.6g (loss %.6g, without adapter %.6g)", best_gamma, best_loss, base)
        return {
            name: Factors(factors.lora_A, factors.lora_B * (best_gamma / self.gamma)) for name, factors in start.items()
        }

    # --- what the slots share -------------------------------------------------------------------------------------

    def bounds(self, budget: Budget) -> tuple[int, int]:
        """(r_min, r_max) under this budget: r / 2 (at least 1) and 4 r unless they are set.

        Raises:
            ConfigError: if r_min is above r_max.
        """
        low = max(1, budget.r // 2) if self.r_min is None else self.r_min
        high = 4 * budget.r if self.r_max is None else self.r_max
        if low > high:
            raise ConfigError(
                f"gora.r_min: {low} is above r_max {high} (r is {budget.r}); set r_min and r_max together"
            )
        return low, high

    def _cap(self, budget: Budget) -> int | None:
        """The largest rank that `allocate` can give, or None where only the layer's size bounds it."""
        r_min, r_max = self.bounds(budget)
        unclamped = self.rank_mode == "official" and r_min == 0
        return None if unclamped else r_max

    def _estimate_rank(self, budget: Budget) -> int:
        return 4 * budget.r if self.r_max is None else self.r_max

    def _drawn_rows(self, shape: LayerShape, budget: Budget) -> int:
        """As many rows of A as the layer can get: the first r of them serve rank r."""
        cap = self._cap(budget)
        return shape.max_rank if cap is None else min(cap, shape.max_rank)

    def _drawn(self, shape: LayerShape, rows: int, seed: int, dtype_cast: DtypeCast) -> Float[Tensor, "rows in"]:
        source = generator(seed, "lora_A", shape.name)
        return dtype_cast(draw_factor(self.initialization, rows, shape.in_features, source))

    def _start_factor(self, start: Start) -> Float[Tensor, "rank in"]:
        shape, matrix = start.layer.shape, None
        if self.initialization == "weight_svd":
            matrix = start.layer.weight().cpu()
        elif self.initialization == "grad_svd" and start.statistics is not None:
            matrix = start.statistics.gradient
        if matrix is not None and matrix.any():
            source = generator(start.seed, "lora_A", shape.name)
            return start.dtype_cast(singular_rows(matrix, start.rank, source))
        rows = self._drawn_rows(shape, start.budget)
        if start.rank > rows:
            raise ConfigError(
                f"layer {shape.name}: rank {start.rank} in the plan is above what gora calibrates for "
                f"({rows}, the smaller of r_max and the layer's size); set gora.r_max to {start.rank}"
            )
        whole = self.initialization == "orthogonal"
        drawn = self._drawn(shape, rows if whole else start.rank, start.seed, start.dtype_cast)
        return drawn[: start.rank].contiguous()

    def _shares(
        self, layers: Sequence[LayerShape], statistics: GradientStatistics | None
    ) -> tuple[list[float], list[str]]:
        """Normalized importance of every layer, and remarks; each member of a pair is normalized on its own."""
        measured = measured_importance(layers, statistics)
        alive = torch.ones(len(layers), dtype=torch.bool)
        if self.rank_mode == "official":
            measured = measured.float()  # the code's own precision: its two-stage rounding feels the last digits
        elif statistics is not None:
            alive = torch.tensor([has_gradient(statistics.layers[layer.name]) for layer in layers])
        if not alive.any() or not measured[alive].any():
            return [1.0 / len(layers)] * len(layers), ["gora: no layer had a gradient, so all got equal shares"]
        if self.scale_importance:
            measured = rooted(measured, layers)
        members = measured[alive].unbind(dim=1)
        normalized = [
            softmax_shares(member, self.temperature) if self.normalization == "softmax" else sum_shares(member)
            for member in members
        ]
        shares = torch.zeros(len(layers), dtype=torch.float64)
        shares[alive] = torch.stack(normalized).mean(dim=0).double()
        inverted = (
            self.importance == "grad_entropy" and self.normalization == "sum" and bool((measured[alive] <= 0).any())
        )
        if not shares.isfinite().all():
            raise CalibrationError("gora: the importances add up to zero, so shares have no meaning; use softmax")
        return shares.tolist(), [_INVERTED] if inverted else []


# --- equations, in the paper's order ------------------------------------------------------------------------------


def paper_ranks(
    shares: Sequence[float], layers: Sequence[LayerShape], r: int, *, phi: Phi, r_min: int, r_max: int
) -> tuple[int, ...]:
    """clip(round(b a / phi(f)), r_min, min(r_max, in, out)) with b = r sum phi(f): at best it keeps sum r_i phi(f_i).

    Source: arXiv 2502.12171v3, the rank rule (quoted by secondary sources); nearest rounding, ties to even.
    """
    sizes = [_PHI[phi](layer.cost) for layer in layers]
    budget = r * sum(sizes)
    wished = (round(budget * share / size) for share, size in zip(shares, sizes, strict=True))
    return tuple(min(max(rank, r_min), r_max, layer.max_rank) for rank, layer in zip(wished, layers, strict=True))


def official_ranks(
    shares: Sequence[float],
    layers: Sequence[LayerShape],
    r: int,
    *,
    phi: Phi,
    rounding: Rounding,
    r_min: int,
    r_max: int,
) -> tuple[float, ...]:
    """The code's two stages: R(b a) // phi(f), a floor whatever R is; clamped only if both bounds are above 0.

    Unclamped ranks are floats under sqrt and log1p, as in the code, and may exceed the layer: `allocate` caps them.

    Source: hhnqqq/MyTransformers 4037d4d, `gora_allocate_stretagy`.
    """
    sizes = [_PHI[phi](layer.cost) for layer in layers]
    budget = r * sum(sizes)
    ranks = [_ROUND[rounding](budget * share) // size for share, size in zip(shares, sizes, strict=True)]
    if r_min and r_max:
        ranks = [min(max(rank, r_min), r_max) for rank in ranks]
    return tuple(ranks)


def descent_direction(found: LayerStatistics, lora_A: Float[Tensor, "rank in"]) -> Float[Tensor, "out rank"]:
    """B* = -G A^+, which minimizes ||G + B A||_F; the minus sign is descent.

    Args:
        found: what calibration kept: G, or G P^T where lora_A is the first rows of P.
        lora_A: A as it is stored.

    Returns:
        float32 on the CPU.

    Raises:
        ConfigError: if the rank is above in: A A^T is then singular.
        CalibrationError: if nothing was kept of the gradient, or it is not finite.

    Source: arXiv 2502.12171v3, eq. 9.
    """
    name, (rank, in_features) = found.shape.name, lora_A.shape
    if rank > in_features:
        raise ConfigError(f"layer {name}: rank {rank} is above its {in_features} inputs; use at most {in_features}")
    kept = found.gradient if found.projection is None else found.projection[:, :rank]
    if kept is None:
        raise CalibrationError(f"layer {name}: calibration kept neither G nor G A^T; calibrate with gora's request")
    if not kept.isfinite().all():
        raise CalibrationError(f"layer {name}: the mean gradient is not finite; look for overflow in the loss")
    return -(regress_dense_on_rows(kept, lora_A) if found.projection is None else regress_on_rows(kept, lora_A))


def gain(gamma: float, in_features: int, rank: int, divisor: float, lora_alpha: float) -> float:
    """Returns gamma sqrt(in / r) rho / alpha, so that the update is -gamma sqrt(in / r) G Pi_A for every alpha and rho.

    rho is the divisor of the scaling rule, alpha / scaling.

    Source: arXiv 2502.12171v3, eq. 10 (xi = gamma sqrt(in) / alpha where rho = sqrt(r)).
    """
    return gamma * math.sqrt(in_features / rank) * divisor / lora_alpha


# --- checks and words ---------------------------------------------------------------------------------------------


def _fill(
    wished: Sequence[float], layers: Sequence[LayerShape], budget: Budget, r_min: int, r_max: int
) -> tuple[int, ...]:
    """Exact whole ranks; a share below 0 (grad_entropy) counts as none."""
    floors = sum(min(r_min, layer.max_rank) * layer.cost for layer in layers)
    if floors > budget.parameters:
        raise BudgetError(
            f"gora.r_min: rank {r_min} in each of {len(layers)} layers costs {floors} parameters, above the budget of "
            f"{budget.parameters} (r: {budget.r}); lower r_min (0 lets layers be dropped) or raise r"
        )
    shares = [max(share, 0.0) for share in wished]
    if not any(shares):
        raise CalibrationError(
            "gora: no importance is above 0, so shares have no meaning; "
            "use another gora.importance or normalization: softmax"
        )
    return water_fill(shares, layers, budget.parameters, floor=r_min, cap=r_max)


_INVERTED = (
    "gora: grad_entropy is at or below 0 in some layers, so that shares are inverted (smaller gradients get larger "
    "shares); use normalization: softmax or another importance"
)


def _reason(rank: int, share: float, layer: LayerShape, r_min: int, r_max: int) -> str:
    told = f"{share:.2%} of the importance"
    if rank == 0:
        return f"{told}: dropped"
    if rank == layer.max_rank and rank <= r_max:
        return f"{told}: the layer's size"
    if rank == r_min:
        return f"{told}: the floor r_min"
    return f"{told}: the cap r_max" if rank == r_max else told


def _sampling_error(layer: LayerShape, statistics: GradientStatistics | None) -> str:
    """The standard error of an importance that comes from a sample of rows, relative to it."""
    found = None if statistics is None else statistics.layers.get(layer.name)
    if found is None or found.scores is None or found.score_errors is None or not found.scores.all():
        return ""
    error = float((found.score_errors / found.scores.abs()).max())
    return f"; sampled, \N{PLUS-MINUS SIGN} {error:.1%}" if math.isfinite(error) else "; sampled, error unknown"


def _summary(
    ranks: Sequence[int], layers: Sequence[LayerShape], spent: int, budget: Budget, r_min: int, r_max: int
) -> tuple[str, ...]:
    capped = sum(rank == min(r_max, layer.max_rank) for rank, layer in zip(ranks, layers, strict=True))
    floored = sum(rank <= r_min for rank in ranks)
    told: tuple[str, ...] = (
        f"gora: {spent} of {budget.parameters} parameters ({spent / budget.parameters:.3f}); of {len(layers)} layers "
        f"{floored} at r_min {r_min} and {capped} at the cap {r_max} or their size",
    )
    if spent > budget.parameters:
        told += (
            f"gora: warning: over budget by {spent / budget.parameters - 1:.1%}, which this rank_mode does not keep; "
            "use rank_mode: exact to compare with a uniform LoRA of the same size",
        )
    return told
