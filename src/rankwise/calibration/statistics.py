"""What calibration is asked for, and what it hands on: plain values, no model in sight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from jaxtyping import Float
from torch import Tensor

from rankwise.ranks.shapes import LayerShape

__all__ = ["CollectorKind", "GradientStatistics", "LayerStatistics", "MemoryMode", "StatisticsRequest"]

MemoryMode = Literal["auto", "exact", "sampled", "low"]
CollectorKind = Literal["auto", "outer", "param"]


@dataclass(frozen=True, kw_only=True)
class StatisticsRequest:
    """What a method needs to know of the mean gradient G [out, in] of each layer.

    Args:
        gradient: keep G itself (float32); refuses `memory: sampled`.
        projection: given the layer's shape, P [k, in] float32 on the CPU; the statistics then hold G @ P.T [out, k],
            exact in every memory mode.
        left_projection: given the layer's shape, Q [k, out] float32 on the CPU; the statistics then hold Q @ G [k, in],
            exact in every memory mode (with `projection` a two-sided sketch of G).
        score: given W [rows, in] and G [rows, in] (float32), one or more float64 numbers [c]. It sees all rows under
            `exact` and `low`.
        score_is_row_mean: the score is a mean over rows, so that a seeded sample of rows estimates it without bias;
            otherwise `memory: sampled` is refused.
        stop: given the number of batches used so far and each layer's score of the running mean, whether to stop
            (adaptive N). Called once for each count from 1 on, in order; every process then runs every batch.
        follow_ups: further readings of the same batches, in order: each makes its request from the statistics so far,
            in which what it asks for replaces what an earlier reading found (power iterations: a projection on the
            range of an earlier one). All of them ask for projections only.
        identity: what distinguishes this request in a cache's fingerprint (method settings that change projection or
            score).
    """

    gradient: bool = False
    projection: Callable[[LayerShape], Float[Tensor, "k in"]] | None = None
    left_projection: Callable[[LayerShape], Float[Tensor, "k out"]] | None = None
    score: Callable[[Float[Tensor, "rows in"], Float[Tensor, "rows in"]], Float[Tensor, " c"]] | None = None
    score_is_row_mean: bool = False
    stop: Callable[[int, Mapping[str, Float[Tensor, " c"]]], bool] | None = None
    follow_ups: "tuple[Callable[[GradientStatistics], StatisticsRequest], ...]" = ()
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Statistics of one layer's mean gradient G [out, in]; tensors are float32 on the CPU unless said otherwise.

    A layer that no batch reached (allowed by `on_unused="min"` only) has `batches` 0 and no tensors at all.

    Args:
        shape: the layer.
        batches: batches that reached the layer and were finite.
        gradient: G, if it was asked for.
        projection: G @ P.T [out, k], if it was asked for.
        left_projection: Q @ G [k, in], if it was asked for.
        scores: float64 [c], if they were asked for.
        score_errors: float64 [c], the standard error of each sampled score; None where scores are exact.
    """

    shape: LayerShape
    batches: int
    gradient: Float[Tensor, "out in"] | None = None
    projection: Float[Tensor, "out k"] | None = None
    left_projection: Float[Tensor, "k in"] | None = None
    scores: Float[Tensor, " c"] | None = None
    score_errors: Float[Tensor, " c"] | None = None


@dataclass(frozen=True, kw_only=True)
class GradientStatistics:
    """Statistics of all layers, in the order of the targets, equal in every process.

    Args:
        layers: by full layer name.
        batches: global batches used.
        skipped: global batches skipped because their loss or gradient was not finite.
        tokens: the weights' sum: label tokens (or rows, for classification) behind the mean.
        loss: the weighted mean loss of the batches used.
        memory: the mode that was used.
        collector: the collector that was used.
        row_share: the share of rows behind `scores` (1.0 unless sampled).
        seconds: wall time of the pass.
        from_cache: whether the statistics were read from a cache file.
    """

    layers: Mapping[str, LayerStatistics]
    batches: int
    skipped: int
    tokens: float
    loss: float
    memory: Literal["exact", "sampled", "low"]
    collector: Literal["outer", "param"]
    row_share: float = 1.0
    seconds: float = 0.0
    from_cache: bool = False

    def updated(self, newer: Self) -> Self:
        """The same statistics with the projections of a later reading of the batches in place of the older ones."""
        layers = {}
        for name, layer in self.layers.items():
            new = newer.layers[name]
            layers[name] = replace(
                layer,
                batches=new.batches,
                projection=layer.projection if new.projection is None else new.projection,
                left_projection=layer.left_projection if new.left_projection is None else new.left_projection,
            )
        return replace(self, layers=layers)
