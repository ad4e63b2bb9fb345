"""What one layer keeps during a pass, and what becomes of it: sums in, LayerStatistics out."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.layers import LinearLayer
from rankwise.calibration.memory import needs_full_sums
from rankwise.calibration.sinks import FullSum, LeftProjection, Projection, RowSample, Sink
from rankwise.calibration.statistics import LayerStatistics, StatisticsRequest
from rankwise.errors import CalibrationError, ConfigError
from rankwise.linalg.random import generator
from rankwise.ranks.shapes import LayerShape

__all__ = ["LayerSums", "sampled_rows"]

SCORE_PARTS = 16
"""A sampled score is computed in so many parts; their spread gives its standard error (to about 1/sqrt(2 * 15))."""


def sampled_rows(shape: LayerShape, share: float, seed: int) -> Tensor:
    """The rows of a layer that stand for all of them, drawn without replacement from the layer's own generator.

    Args:
        shape: the layer.
        share: in (0, 1]; at least two rows are drawn where there are two, so that their spread can be seen.
        seed: the run's seed.

    Returns:
        int64 [rows] on the CPU, in random order (any run of them is a sample too).
    """
    count = min(shape.out_features, max(2, round(share * shape.out_features)))
    return torch.randperm(shape.out_features, generator=generator(seed, "row_sample", shape.name))[:count]


class LayerSums:
    """The running sums of one layer.

    Args:
        layer: the target.
        request: what the statistics must hold.
        mode: `exact` keeps the whole gradient if the request needs any of it, `sampled` some rows.
        share: the share of rows under `sampled`.
        seed: the run's seed.
        on_cpu: whether full sums live on the CPU although the layer does not.
    """

    def __init__(
        self,
        layer: LinearLayer,
        request: StatisticsRequest,
        mode: Literal["exact", "sampled"],
        *,
        share: float,
        seed: int,
        on_cpu: bool,
    ) -> None:
        self.layer = layer
        self._request = request
        self._full: FullSum | None = None
        self._sample: RowSample | None = None
        self._projection: Projection | None = None
        self._left: LeftProjection | None = None
        shape, device = layer.shape, layer.device
        home = torch.device("cpu") if on_cpu else device
        if mode == "exact" and needs_full_sums(request):
            self._full = FullSum(shape.out_features, shape.in_features, home)
            return  # projections of a whole gradient are one product at the end
        if request.score is not None:
            rows = sampled_rows(shape, share, seed).to(device)
            self._sample = RowSample(rows, shape.in_features, home)
        if request.projection is not None:
            self._projection = Projection(self._matrix("projection", request.projection), shape.out_features)
        if request.left_projection is not None:
            self._left = LeftProjection(self._matrix("left_projection", request.left_projection), shape.in_features)

    @property
    def sinks(self) -> list[Sink]:
        """The sums that a batch is added to."""
        kept: list[Sink | None] = [self._full, self._sample, self._projection, self._left]
        return [sink for sink in kept if sink is not None]

    def scores(self, weight: float) -> Float[Tensor, " c"]:
        """The request's scores of the running mean, float64 on the CPU; the sums stay as they are."""
        return self._scored(weight)[0]

    def finish(self, weight: float, batches: int) -> LayerStatistics:
        """The statistics of the mean gradient; the sums are used up.

        Args:
            weight: the sum of the batches' weights, > 0.
            batches: how many batches reached the layer.
        """
        for sink in self.sinks:
            sink.total.div_(weight)
        scores, errors = self._scored(1.0) if self._request.score is not None else (None, None)
        gradient, right, left = self._gradient_and_projections()
        self._full = self._sample = self._projection = self._left = None
        return LayerStatistics(
            shape=self.layer.shape,
            batches=batches,
            gradient=gradient,
            projection=right,
            left_projection=left,
            scores=scores,
            score_errors=errors,
        )

    def _gradient_and_projections(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        request = self._request
        gradient = right = left = None
        if self._full is not None:
            mean = self._full.total
            if request.projection is not None:
                right = mean @ self._matrix("projection", request.projection).to(mean.device).T
            if request.left_projection is not None:
                left = self._matrix("left_projection", request.left_projection).to(mean.device) @ mean
            if request.gradient:
                gradient = mean.cpu()
        if self._projection is not None:
            right = self._projection.total
        if self._left is not None:
            left = self._left.total
        return gradient, None if right is None else right.cpu(), None if left is None else left.cpu()

    def _scored(self, weight: float) -> tuple[Tensor, Tensor | None]:
        """Scores [c], and their standard errors where they come from a sample of rows."""
        if self._full is not None:
            mean = _divided(self._full.total, weight)
            return self._score(self.layer.weight(torch.float32).to(mean.device), mean), None
        assert self._sample is not None, "scores need the gradient or a sample of its rows"
        rows, mean = self._sample.rows, _divided(self._sample.total, weight)
        weights = self.layer.weight(self._sample.total.dtype).index_select(0, rows).to(mean.device)
        parts = min(SCORE_PARTS, len(rows))
        values = [self._score(w, g) for w, g in zip(weights.tensor_split(parts), mean.tensor_split(parts), strict=True)]
        sizes = [len(part) for part in rows.tensor_split(parts)]
        return _mean_and_error(torch.stack(values), torch.tensor(sizes), self.layer.shape.out_features)

    def _score(self, weights: Tensor, gradient: Tensor) -> Tensor:
        assert self._request.score is not None
        values = torch.as_tensor(self._request.score(weights, gradient)).detach().to("cpu", torch.float64).reshape(-1)
        if not values.isfinite().all():
            raise CalibrationError(
                f"{self.layer.name}: the method's importance is {values.tolist()} although weight and gradient are "
                "finite. Check the layer's weights for extreme values, or exclude the layer."
            )
        return values

    def _matrix(self, what: str, build: Callable[[LayerShape], Tensor]) -> Tensor:
        """The request's projection matrix, float32 on the layer's device."""
        shape = self.layer.shape
        matrix = build(shape)
        columns = shape.in_features if what == "projection" else shape.out_features
        if matrix.ndim != 2 or matrix.shape[1] != columns:
            raise ConfigError(
                f"{shape.name}: the method's {what} has the shape {list(matrix.shape)}; allowed is [k, {columns}]."
            )
        return matrix.detach().to(self.layer.device, torch.float32)


def _mean_and_error(
    parts: Float[Tensor, "parts c"], sizes: Tensor, population: int
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean over rows and its standard error, from means over parts of a sample drawn without replacement.

    Sampling theory: the variance of one row is estimated by sum_g n_g (m_g - m)^2 / (parts - 1), that of the mean of n
    of N rows is this / n * (1 - n / N) (finite population correction: all rows have no error).
    """
    count = int(sizes.sum())
    shares = (sizes.to(parts.dtype) / count)[:, None]
    mean = (shares * parts).sum(0)
    if count == population:
        return mean, torch.zeros_like(mean)
    if len(parts) == 1:
        return mean, torch.full_like(mean, torch.inf)
    row_variance = (sizes.to(parts.dtype)[:, None] * (parts - mean).square()).sum(0) / (len(parts) - 1)
    return mean, (row_variance / count * (1 - count / population)).sqrt()


def _divided(total: Tensor, weight: float) -> Tensor:
    return total if weight == 1.0 else total / weight
