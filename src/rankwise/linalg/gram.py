"""Norms of products and of updated weights by Gram matrices: no dense product is formed.

Computed in the inputs' dtype (float32 or wider) on their device; stacks over leading dimensions.
"""

from jaxtyping import Float
from torch import Tensor

__all__ = ["gram_norm", "gram_row_squares", "updated_row_squares"]


def gram_row_squares(left: Float[Tensor, "*b m k"], right: Float[Tensor, "*b k n"]) -> Float[Tensor, "*b m"]:
    """Squared norm of each row of left @ right: left_i (right right^T) left_i^T, at least 0."""
    return ((left @ (right @ right.mT)) * left).sum(dim=-1).clamp(min=0)


def gram_norm(left: Float[Tensor, "*b m k"], right: Float[Tensor, "*b k n"]) -> Float[Tensor, "*b"]:
    """Frobenius norm of left @ right: sqrt(tr((left^T left) (right right^T))).

    Relative to |left| |right| it is exact to rounding; where the parts of the product nearly cancel, `product_norm`
    of `factors` (by QR) keeps more digits. Only the k x k matrices are float64: there large terms cancel.
    """
    squares = (_widest(left.mT @ left) * _widest(right @ right.mT)).sum(dim=(-2, -1))
    return squares.clamp(min=0).sqrt().to(left.dtype)


def updated_row_squares(
    weight_squares: Float[Tensor, "*b m"],
    products: Float[Tensor, "*b m k"],
    lora_A: Float[Tensor, "*b k n"],
    lora_B: Float[Tensor, "*b m k"],
    scaling: float,
) -> Float[Tensor, "*b m"]:
    """Squared row norms of W + s B A: |W_i|^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T, at least 0.

    A pair that is subtracted enters as more columns: B as [B, -B0] and A as [A; A0].

    Args:
        weight_squares: |W_i|^2.
        products: W A^T.
        lora_A: A.
        lora_B: B.
        scaling: s.
    """
    own = (lora_B @ (lora_A @ lora_A.mT)) * lora_B
    return (weight_squares + (2 * scaling * products * lora_B + scaling**2 * own).sum(dim=-1)).clamp(min=0)


def _widest(matrix: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return matrix if matrix.device.type == "mps" else matrix.double()
