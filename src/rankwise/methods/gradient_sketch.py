"""The singular vectors of a gradient that is never formed: a few products with it, and their own error."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from rankwise.calibration.statistics import GradientStatistics, LayerStatistics, StatisticsRequest
from rankwise.errors import CalibrationError
from rankwise.linalg.factors import product_norm
from rankwise.linalg.random import generator
from rankwise.linalg.sketch import factored_svd, orthonormal_range, two_sided_svd
from rankwise.methods.base import Factors
from rankwise.ranks.shapes import LayerShape

__all__ = ["HELD_OUT", "Sketch", "missed_energy"]

Side = Literal["left", "right"]

OVERSAMPLED = 8
"""Columns of the sketch beyond 2r."""
HELD_OUT = 8
"""Products a side that are kept aside, to measure the sketch's own error."""


@dataclass(frozen=True)
class Sketch:
    """2r + 8 products with G on one side, a basis of which is multiplied by G from the other side in turn.

    The first rows of every projection are held out: fixed random rows that no basis is built from. Readings after the
    first project on orthonormal bases: of the columns G P^T, then of the rows found, and so on (block power iteration,
    Halko, Martinsson, Tropp, arXiv 0909.4061v2, algorithm 4.4, one half step a reading). Without them the one pass
    takes 4r + 17 random products from the left as well (`linalg.sketch.two_sided_svd`).

    Args:
        power_iterations: readings after the first.
        seed: the run's seed.
    """

    power_iterations: int
    seed: int

    def request(self, r: int, ranks: Mapping[str, int] | None = None) -> StatisticsRequest:
        """The first reading, and those that follow.

        Args:
            r: the rank of a layer that `ranks` does not name.
            ranks: by layer, its rank.
        """
        ranks = {name: rank for name, rank in (ranks or {}).items() if rank != r}

        def width(shape: LayerShape) -> int:
            return min(2 * ranks.get(shape.name, r) + OVERSAMPLED, shape.max_rank)

        def right(shape: LayerShape) -> Tensor:
            return torch.cat([self._held_out(shape, "right"), self._random(shape, "right", width(shape))])

        def left(shape: LayerShape) -> Tensor:
            rows = 0 if self.power_iterations else min(2 * width(shape) + 1, shape.out_features)
            return torch.cat([self._held_out(shape, "left"), self._random(shape, "left", rows)])

        sides: list[Callable[[GradientStatistics], StatisticsRequest]] = [self._from_left, self._from_right]
        return StatisticsRequest(
            projection=right,
            left_projection=left,
            follow_ups=tuple(sides[number % 2] for number in range(self.power_iterations)),
            identity=f"lora-ga sketch {(r, self.power_iterations, self.seed, OVERSAMPLED, HELD_OUT)}"
            + (f" {sorted(ranks.items())}" if ranks else ""),
        )

    def triples(
        self, found: LayerStatistics
    ) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
        """Singular triples of the approximation of G: as many as the sketch has columns, or the layer allows.

        Raises:
            CalibrationError: if the statistics hold neither G nor its sketch.
        """
        if found.projection is None or found.left_projection is None:
            raise CalibrationError(
                f"layer {found.shape.name}: calibration kept neither G nor its sketch; calibrate with lora-ga's request"
            )
        products, left_products = found.projection[:, HELD_OUT:], found.left_projection[HELD_OUT:]
        if self.power_iterations == 0:
            return two_sided_svd(products, left_products, self._random(found.shape, "left", len(left_products)))
        if self.power_iterations % 2:
            return factored_svd(orthonormal_range(products), left_products)
        return factored_svd(products, orthonormal_range(left_products.mT).mT)

    def missed_energy(self, found: LayerStatistics, factors: Factors) -> tuple[float, float]:
        """`missed_energy` of a gradient that was only sketched, estimated without bias.

        G = K + R with K known from the sketch. What concerns K alone is computed; what concerns R is estimated from the
        products Psi R P^T of the rows that were held out. R is small and flat, so that few rows do.
        """
        U, S, Vh = self.triples(found)
        assert found.projection is not None
        assert found.left_projection is not None
        P, Psi = self._held_out(found.shape, "right"), self._held_out(found.shape, "left")
        A, B = _unit_factors(factors)
        US, BK, KA = U * S, (B.mT @ U) * S @ Vh, U * S @ (Vh @ A.mT)
        # K - M(K) = [U S, -B, -K A^T] [Vh; B^T K; A]
        left, right = torch.cat([US, -B, -KA], dim=1), torch.cat([Vh, BK, A])
        known = Psi @ left @ (right @ P.mT)
        RP, PsiR = found.projection[:, :HELD_OUT] - US @ (Vh @ P.mT), found.left_projection[:HELD_OUT] - (Psi @ US) @ Vh
        rest = Psi @ RP - (Psi @ B) @ (B.mT @ RP) - (PsiR @ A.mT) @ (A @ P.mT)
        missed = product_norm(right, left) ** 2 + _mean(2 * known * rest + rest.square())
        KP, PsiK = US @ (Vh @ P.mT), (Psi @ US) @ Vh
        sides = [(2 * KP * RP + RP.square()).double().sum(), (2 * PsiK * PsiR + PsiR.square()).double().sum()]
        whole = float(S.double().square().sum()) + float(sum(sides)) / (2 * HELD_OUT)
        return max(missed, 0.0), max(whole, 0.0)

    def _held_out(self, shape: LayerShape, side: Side) -> Float[Tensor, "k features"]:
        """Rows from which only the error is estimated."""
        return self._random(shape, side, HELD_OUT, "held_out_")

    def _random(self, shape: LayerShape, side: Side, rows: int, kind: str = "") -> Float[Tensor, "k features"]:
        features = shape.in_features if side == "right" else shape.out_features
        return torch.randn(rows, features, generator=generator(self.seed, f"lora_ga_{kind}{side}", shape.name))

    def _from_left(self, statistics: GradientStatistics) -> StatisticsRequest:
        def rows(shape: LayerShape) -> Tensor:
            products = statistics.layers[shape.name].projection
            basis = [] if products is None else [orthonormal_range(products[:, HELD_OUT:]).mT]
            return torch.cat([self._held_out(shape, "left"), *basis])

        return StatisticsRequest(left_projection=rows)

    def _from_right(self, statistics: GradientStatistics) -> StatisticsRequest:
        def rows(shape: LayerShape) -> Tensor:
            products = statistics.layers[shape.name].left_projection
            basis = [] if products is None else [orthonormal_range(products[HELD_OUT:].mT).mT]
            return torch.cat([self._held_out(shape, "right"), *basis])

        return StatisticsRequest(projection=rows)


def missed_energy(gradient: Float[Tensor, "out in"], factors: Factors) -> tuple[float, float]:
    """(||G - M||^2, ||G||^2) with M = B B^T G + G A^T A over unit rows and columns: what the first step leaves of G.

    B B^T and A^T A are projectors, so that ||G - M||^2 = ||G||^2 - ||B^T G||^2 - ||G A^T||^2 + 2 ||B^T G A^T||^2: G is
    read three times and nothing of its size is made. Rounding shows below 1e-3 of ||G||.

    Args:
        gradient: G.
        factors: a start of orthogonal rows and columns; ranks whose column of B is zero count for nothing.

    Source: the first-step direction of arXiv 2407.05000 (authors' code), normalized.
    """
    A, B = _unit_factors(factors)
    rows = B.mT @ gradient
    parts = (gradient, rows, gradient @ A.mT, rows @ A.mT)
    whole, left, right, both = (float(torch.linalg.vector_norm(part)) ** 2 for part in parts)
    return max(whole - left - right + 2 * both, 0.0), whole


def _unit_factors(factors: Factors) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    live = factors.lora_B.any(0)
    return normalize(factors.lora_A[live], dim=1), normalize(factors.lora_B[:, live], dim=0)


def _mean(products: Float[Tensor, "k k"]) -> float:
    return float(products.double().mean())
