"""How much a layer matters: measures of its weight W and mean gradient G, and their shares of the whole.

The kinds are those of GoRA's code (arXiv 2502.12171v3; hhnqqq/MyTransformers 4037d4d); `union_mean` is the paper's.
`union` measures the element-wise product W * G, `grad` measures G alone. Everything runs in float32 or wider.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.calibration.statistics import GradientStatistics, LayerStatistics
from rankwise.errors import CalibrationError
from rankwise.ranks.shapes import LayerShape

__all__ = [
    "ROW_MEANS",
    "Importance",
    "StopRule",
    "estimated_singular_values",
    "has_converged",
    "has_gradient",
    "importance_of",
    "mean_absolute_product",
    "measured_importance",
    "rooted",
    "softmax_shares",
    "sum_shares",
]

Importance = Literal[
    "union_mean",
    "union_frobenius_norm",
    "union_2ord_norm",
    "union_nuc_norm",
    "union_est_nuc_norm",
    "grad_mean",
    "grad_frobenius_norm",
    "grad_nuc_norm",
    "grad_est_nuc_norm",
    "grad_entropy",
    "union_mean_grad_nuc_norm",
    "union_mean_union_nuc_norm",
    "grad_mean_grad_nuc_norm",
]
_PAIRS: Mapping[str, tuple[str, str]] = {
    "union_mean_grad_nuc_norm": ("union_mean", "grad_est_nuc_norm"),
    "union_mean_union_nuc_norm": ("union_mean", "union_est_nuc_norm"),
    "grad_mean_grad_nuc_norm": ("grad_mean", "grad_est_nuc_norm"),
}

ROW_MEANS: frozenset[Importance] = frozenset({"union_mean", "union_2ord_norm", "grad_mean"})
"""Kinds that are a mean over rows, so that a sample of rows estimates them without bias."""

_BLOCK = 1 << 18  # entries of one float32 block, 1 MB: about a second-level cache, and few calls
_EQUAL = 1e-6  # importances closer than this, relative to their mean, differ by float32 noise only


def importance_of(
    kind: Importance,
    weight: Float[Tensor, "rows in"],
    gradient: Float[Tensor, "rows in"],
    estimate_rank: int,
    source: torch.Generator,
) -> Float[Tensor, " c"]:
    """How much one layer matters, from its weight and mean gradient.

    Args:
        kind: what is measured.
        weight: W [rows, in], any floating dtype.
        gradient: G [rows, in].
        estimate_rank: singular values behind the `est_nuc` kinds (sums of log1p of singular values, despite the name).
        source: the CPU generator of the randomized decomposition behind them.

    Returns:
        float64 [1], or [2] for the paired kinds, on the CPU.

    Source: arXiv 2502.12171v3, eq. 5 (union_mean); hhnqqq/MyTransformers 4037d4d for the others.
    """
    return torch.tensor(
        [_one_importance(member, weight, gradient, estimate_rank, source) for member in _PAIRS.get(kind, (kind,))],
        dtype=torch.float64,
    )


def _one_importance(kind: str, weight: Tensor, gradient: Tensor, estimate_rank: int, source: torch.Generator) -> float:
    if kind == "union_mean":
        return mean_absolute_product(weight, gradient)
    union = kind.startswith("union")
    matrix = (weight.float() * gradient.float()) if union else gradient.float()
    measure = kind.removeprefix("union_").removeprefix("grad_")
    if measure == "mean":
        return float(matrix.abs().mean(dtype=torch.float64))
    if measure == "frobenius_norm":
        return float(matrix.double().norm())
    if measure == "2ord_norm":
        return float(matrix.norm(dim=1).mean(dtype=torch.float64))
    if measure == "nuc_norm":
        return float(torch.linalg.svdvals(matrix).sum(dtype=torch.float64))
    if measure == "est_nuc_norm":
        return float(estimated_singular_values(matrix, estimate_rank, source).double().log1p().sum())
    deviation = max(float(matrix.double().std(correction=1)), 1e-8)
    return math.log(deviation) + 0.5 * math.log(2 * math.pi) + 0.5  # entropy of a Gaussian


def estimated_singular_values(
    matrix: Float[Tensor, "rows in"], count: int, source: torch.Generator, *, power_iterations: int = 8
) -> Float[Tensor, " k"]:
    """About the `count` largest singular values, by the range finder of `torch.svd_lowrank` with its own generator.

    It has no oversampling and, unlike `linalg.spectrum.truncated_svd`, no exact shortcut: the bias is part of it.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061v2, algorithms 4.4 and 5.1; hhnqqq/MyTransformers 4037d4d.
    """
    tall = matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix
    start = torch.randn(tall.shape[1], min(count, tall.shape[1]), generator=source).to(tall)
    basis = torch.linalg.qr(tall @ start).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.mT @ basis).Q).Q
    values: Tensor = torch.linalg.svdvals(basis.mT @ tall)
    return values


def mean_absolute_product(weight: Float[Tensor, "rows in"], gradient: Float[Tensor, "rows in"]) -> float:
    """Mean |W * G| in float32 blocks of whole rows that stay in cache, so that W and G are read once.

    Source: arXiv 2502.12171v3, eq. 5.
    """
    rows, columns = weight.shape
    step = max(1, _BLOCK // columns)
    product = torch.empty(min(step, rows), columns, device=weight.device)
    ones = torch.ones(columns, device=weight.device)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for first in range(0, rows, step):
        block = product[: min(step, rows - first)]
        if weight.dtype == gradient.dtype == torch.float32:
            torch.mul(weight[first : first + step], gradient[first : first + step], out=block)
        else:
            block.copy_(weight[first : first + step]).mul_(gradient[first : first + step])
        # One BLAS call a block adds the rows up; the sums of rows are then added in float64.
        total += torch.mv(block.abs_(), ones).double().sum()
    return total.item() / weight.numel()


def sum_shares(importance: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
    """I / sum(I). Source: hhnqqq/MyTransformers 4037d4d; secondary sources on arXiv 2502.12171."""
    return importance / importance.sum()


def softmax_shares(importance: Float[Tensor, " layers"], temperature: float) -> Float[Tensor, " layers"]:
    """softmax((I - min) / (max - min) / temperature), uniform where all importances are equal up to noise.

    Source: hhnqqq/MyTransformers 4037d4d, `softmax_importance`.
    """
    spread = importance.max() - importance.min()
    if spread <= _EQUAL * importance.abs().mean():
        return torch.full_like(importance, 1.0 / len(importance))
    return torch.softmax((importance - importance.min()) / spread / temperature, dim=0)


def rooted(measured: Float[Tensor, "layers c"], layers: Sequence[LayerShape]) -> Float[Tensor, "layers c"]:
    """The root of every importance (`scale_importance`).

    Raises:
        CalibrationError: for an importance below 0, which only an entropy can be; the layer is named.
    """
    negative = [layer.name for layer, row in zip(layers, measured, strict=True) if (row < 0).any()]
    if negative:
        raise CalibrationError(
            f"gora.scale_importance takes the root of an importance below 0 in layer {negative[0]}; turn it off"
        )
    return measured.sqrt()


def has_converged(
    previous: Float[Tensor, "layers c"],
    current: Float[Tensor, "layers c"],
    threshold: float,
    floor: Float[Tensor, " c"] | float,
) -> bool:
    """Whether |I - I'| / (|I'| + floor) <= threshold in every layer, for both members of a pair.

    Source: hhnqqq/MyTransformers 4037d4d, `gora_convergence_threshold`.
    """
    return bool(((current - previous).abs() / (previous.abs() + floor) <= threshold).all())


class StopRule:
    """Remembers the last importances of one calibration and says when they have settled (adaptive number of batches).

    Args (of the constructor): the batches before it may stop; the largest relative change; what keeps the ratio finite,
    1e-3 of the mean importance (`relative`) or the code's 1e-8 (`absolute`).

    The relative change of a running mean falls as 1 / t even for pure noise: stopping near ten batches proves little.
    """

    def __init__(self, min_batches: int, threshold: float, floor: Literal["relative", "absolute"]) -> None:
        self._min_batches = min_batches
        self._threshold = threshold
        self._relative = floor == "relative"
        self._previous: Tensor | None = None

    def __call__(self, batches: int, scores: Mapping[str, Float[Tensor, " c"]]) -> bool:
        """Whether to stop after this many batches.

        Args:
            batches: batches seen so far, 1-based; 1 starts anew.
            scores: each layer's importance of the running mean gradient.
        """
        current = torch.stack([scores[name].double() for name in sorted(scores)])
        previous, self._previous = (None if batches <= 1 else self._previous), current
        if previous is None or batches < self._min_batches:
            return False
        floor = 1e-3 * previous.abs().mean(dim=0) if self._relative else 1e-8
        return has_converged(previous, current, self._threshold, floor)


def measured_importance(
    layers: Sequence[LayerShape], statistics: GradientStatistics | None
) -> Float[Tensor, "layers c"]:
    """What calibration measured, float64 on the CPU, in the order of the layers.

    Raises:
        CalibrationError: if nothing was measured or a number is not finite; every such layer is named.
    """
    if statistics is None:
        raise CalibrationError("ranks follow gradient statistics here, and there are none: pass calibration batches")
    rows: list[Tensor | None] = []
    faults = []
    for layer in layers:
        found = statistics.layers.get(layer.name)
        if found is not None and found.batches == 0:
            rows.append(None)  # no batch reached it (on_unused="min")
        elif found is None or found.scores is None:
            faults.append(f"layer {layer.name}: calibration found no importance; calibrate with this method's request")
        elif not found.scores.isfinite().all():
            faults.append(
                f"layer {layer.name}: importance {found.scores.tolist()} is not finite; "
                "look for overflow in its gradient"
            )
        else:
            rows.append(found.scores.double().cpu())
    if faults:
        raise CalibrationError("\n".join(faults))
    nothing = next((torch.zeros_like(row) for row in rows if row is not None), torch.zeros(1, dtype=torch.float64))
    return torch.stack([nothing if row is None else row for row in rows])


def has_gradient(found: LayerStatistics) -> bool:
    """Whether anything that is kept of the layer's gradient differs from zero."""
    kept = [kept for kept in (found.projection, found.gradient) if kept is not None]
    return found.batches > 0 and (not kept or any(bool(tensor.any()) for tensor in kept))
