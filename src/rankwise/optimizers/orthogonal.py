"""The first of two passes that make thin factors orthonormal without squaring their condition number twice."""

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.optimizers.tall import Tall

__all__ = ["nearly_orthonormal"]


def nearly_orthonormal(tall: Tall, epsilon: float) -> tuple[Float[Tensor, "r r"], Tensor]:
    """(W, W^T F): W is invertible and the rows of W^T F are orthonormal but for condition^2 * eps.

    Products of W^T F are exact to rounding in every direction, also in those in which F F^T has lost all digits.

    Args:
        tall: one factor F.
        epsilon: the rounding of its type.

    Returns:
        W [r, r], float64, and W^T F in the factor's layout and type; both 0 for F = 0.
    """
    values, vectors = torch.linalg.eigh(tall.product(tall.factor, tall.factor).double())
    largest = values[-1].clamp(min=0)
    if not bool(largest > 0):
        return torch.zeros_like(vectors), torch.zeros_like(tall.factor)
    inverse = vectors * values.clamp(min=tall.rank * epsilon * float(largest)).rsqrt()
    return inverse, tall.combine(inverse.mT.to(tall.factor.dtype), tall.factor)
