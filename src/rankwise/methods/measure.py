"""Answers a method's request from a gradient that is already there, reading W and G once."""

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.calibration.statistics import LayerStatistics, StatisticsRequest
from rankwise.ranks.shapes import LayerShape

__all__ = ["measure"]

_ROWS = 128  # enough rows for the product to run at full speed, few enough for the float32 block to stay in cache


def measure(
    request: StatisticsRequest,
    shape: LayerShape,
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    *,
    batches: int = 1,
) -> LayerStatistics:
    """What calibration would have found in one layer whose mean gradient is known.

    Where the score is a mean over rows, G is widened to float32 a block of rows at a time, and each block is scored and
    projected while it is in cache; W reaches the score in the dtype it is stored in.

    Args:
        request: what a method asks for.
        shape: the layer.
        weight: W, any floating dtype.
        gradient: the mean gradient G, any floating dtype.
        batches: how many batches are behind G.

    Returns:
        float32 statistics (float64 scores); `gradient` only if it was asked for.
    """
    rows = request.projection(shape).to(gradient.device) if request.projection is not None else None
    step = _ROWS if request.score is None or request.score_is_row_mean else shape.out_features
    wide = torch.empty(min(step, shape.out_features), shape.in_features, device=gradient.device)
    products = None if rows is None else torch.empty(shape.out_features, rows.shape[0], device=gradient.device)
    scores: Tensor | None = None
    for first in range(0, shape.out_features, step):
        last = min(first + step, shape.out_features)
        block = wide[: last - first].copy_(gradient[first:last])
        if request.score is not None:
            part = request.score(weight[first:last], block) * ((last - first) / shape.out_features)
            scores = part if scores is None else scores + part
        if rows is not None and products is not None:
            torch.mm(block, rows.mT, out=products[first:last])
    return LayerStatistics(
        shape=shape,
        batches=batches,
        gradient=gradient.float().cpu() if request.gradient else None,
        projection=None if products is None else products.cpu(),
        scores=scores,
    )
