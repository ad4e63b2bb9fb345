"""Layers with a known weight and gradient, and what calibration would have found in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.statistics import GradientStatistics
from rankwise.methods.base import Budget, DtypeCast, Factors, Start, keep_float32
from rankwise.methods.gora import GoRA
from rankwise.methods.measure import measure
from rankwise.ranks.shapes import LayerShape, uniform_budget


@dataclass(frozen=True)
class Known:
    """A layer whose weight W and mean gradient G are known."""

    layer: LinearLayer
    weight: Tensor
    gradient: Tensor

    @property
    def shape(self) -> LayerShape:
        return self.layer.shape


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def known(name: str, weight: Tensor, gradient: Tensor) -> Known:
    out_features, in_features = weight.shape
    with torch.random.fork_rng(devices=[]):
        module = nn.Linear(in_features, out_features, bias=False)
    module.weight.data = weight
    return Known(LinearLayer(name, module, "linear", LayerShape(name, out_features, in_features)), weight, gradient)


def several(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Known]:
    """Layers of these [out, in] with random weights, and gradients of very different size."""
    found = []
    for k, (out_features, in_features) in enumerate(sizes):
        weight = random(out_features, in_features, seed=1000 * seed + 2 * k)
        gradient = random(out_features, in_features, seed=1000 * seed + 2 * k + 1) * (0.05 + (37 * k + 11 * seed) % 10)
        found.append(known(f"layers.{k}", weight, gradient))
    return found


def budget_of(shapes: Sequence[LayerShape], r: int = 8, lora_alpha: float = 16) -> Budget:
    return Budget(r=r, lora_alpha=lora_alpha, parameters=uniform_budget(shapes, r))


def statistics_of(
    method: GoRA, layers: Sequence[Known], budget: Budget, *, seed: int = 0, dtype_cast: DtypeCast = keep_float32
) -> GradientStatistics:
    request = method.request([layer.shape for layer in layers], budget, seed, dtype_cast=dtype_cast)
    found = {layer.shape.name: measure(request, layer.shape, layer.weight, layer.gradient) for layer in layers}
    return GradientStatistics(
        layers=found, batches=1, skipped=0, tokens=1.0, loss=1.0, memory="exact", collector="outer"
    )


def ranks_of(method: GoRA, layers: Sequence[Known], *, r: int = 8) -> tuple[int, ...]:
    shapes = [layer.shape for layer in layers]
    budget = budget_of(shapes, r)
    return method.allocate(shapes, budget, statistics_of(method, layers, budget)).ranks


def start_of(
    method: GoRA,
    layer: Known,
    rank: int,
    *,
    r: int = 8,
    lora_alpha: float = 16,
    seed: int = 0,
    dtype_cast: DtypeCast = keep_float32,
) -> tuple[Factors, float]:
    """The factors at step 0 and the scaling that multiplies them."""
    budget = budget_of([layer.shape], r, lora_alpha)
    statistics = statistics_of(method, [layer], budget, seed=seed, dtype_cast=dtype_cast)
    rule = method.scaling_rule()
    factors = method.initialize(
        Start(
            layer=layer.layer,
            rank=rank,
            divisor=rule.divisor(rank, r),
            budget=budget,
            seed=seed,
            dtype_cast=dtype_cast,
            statistics=statistics.layers[layer.shape.name],
        )
    )
    return factors, rule.scaling(lora_alpha, rank, r)


def update_of(factors: Factors, scaling: float) -> Tensor:
    """Scaling * B A in float64."""
    return scaling * factors.lora_B.double() @ factors.lora_A.double()


def projector(lora_A: Tensor) -> Tensor:
    """Pi_A = A^T (A A^T)^-1 A by the pseudo-inverse, in float64: the slow reference."""
    wide = lora_A.double()
    return torch.linalg.pinv(wide) @ wide


def relative(found: Tensor, reference: Tensor) -> float:
    return ((found.double() - reference.double()).norm() / reference.double().norm()).item()


def by_name(shapes: Sequence[LayerShape], ranks: Sequence[int]) -> Mapping[str, int]:
    return {shape.name: rank for shape, rank in zip(shapes, ranks, strict=True)}
