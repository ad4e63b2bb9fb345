"""What the calibration tests share: a slow reference by plain autograd, targets, requests."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer, view_linear
from rankwise.calibration.statistics import GradientStatistics, StatisticsRequest
from rankwise.linalg.random import generator
from rankwise.ranks.shapes import LayerShape

Batch = dict[str, Tensor]

HEADS = ("lm_head", "classifier", "head")


def targets(model: nn.Module, skip: Sequence[str] = HEADS) -> list[LinearLayer]:
    """Every linear layer but the heads, in the model's order."""
    views = ((name, view_linear(name, module)) for name, module in model.named_modules())
    return [view for name, view in views if view is not None and name not in skip]


def label_tokens(batch: Batch) -> float:
    """What a causal loss sees."""
    return float((batch["labels"][:, 1:] != -100).sum())


def reference(
    model: nn.Module,
    batches: Sequence[Any],
    weight: Callable[[Any], float],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The weighted mean of autograd's own weight gradients, float64, [out, in]; leaves the model without gradients."""
    layers = targets(model)
    for layer in layers:
        layer.module.weight.requires_grad_(True)
    sums = {layer.name: torch.zeros(layer.shape.out_features, layer.shape.in_features).double() for layer in layers}
    for batch in batches:
        model.zero_grad(set_to_none=True)
        (model(**batch).loss if loss is None else loss(model, batch)).backward()
        for layer in layers:
            grad = layer.module.weight.grad
            if grad is not None:
                sums[layer.name] += weight(batch) * (grad.T if layer.kind == "conv1d" else grad).double()
    model.zero_grad(set_to_none=True)
    total = sum(weight(batch) for batch in batches)
    return {name: value / total for name, value in sums.items()}


def right(shape: LayerShape) -> Tensor:
    return torch.randn(4, shape.in_features, generator=generator(0, "right", shape.name))


def left(shape: LayerShape) -> Tensor:
    return torch.randn(3, shape.out_features, generator=generator(0, "left", shape.name))


def union_mean(weight: Tensor, gradient: Tensor) -> Tensor:
    """GoRA's default importance: mean |W * G|, a mean over rows."""
    return (weight * gradient).abs().mean(dtype=torch.float64)[None]


GRADIENT = StatisticsRequest(gradient=True)
SCORE = StatisticsRequest(score=union_mean, score_is_row_mean=True)


def range_from_left(statistics: GradientStatistics) -> StatisticsRequest:
    """Projects on the range that `right` found: the second half of a power iteration."""

    def rows(shape: LayerShape) -> Tensor:
        products = statistics.layers[shape.name].projection
        return left(shape) if products is None else torch.linalg.qr(products).Q.mT

    return StatisticsRequest(left_projection=rows)


def range_from_right(statistics: GradientStatistics) -> StatisticsRequest:
    """Projects on the range of the rows found before."""

    def rows(shape: LayerShape) -> Tensor:
        products = statistics.layers[shape.name].left_projection
        return right(shape) if products is None else torch.linalg.qr(products.mT).Q.mT

    return StatisticsRequest(projection=rows)


FOLLOWED = StatisticsRequest(projection=right, follow_ups=(range_from_left, range_from_right))
EVERYTHING = StatisticsRequest(projection=right, left_projection=left, score=union_mean, score_is_row_mean=True)


def relative(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted| / max |wanted|."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))


def worst_gradient_error(statistics: GradientStatistics, wanted: dict[str, Tensor]) -> float:
    """Frobenius error of the gradients relative to their size, the worst layer."""
    return max(
        float((statistics.layers[name].gradient.double() - gradient).norm() / gradient.norm())
        for name, gradient in wanted.items()
    )
