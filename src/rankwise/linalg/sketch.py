"""A matrix from a few products with it: the singular triples that two thin sketches determine.

Everything is computed in the inputs' precision, float32 at least, on the inputs' device.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.linalg.spectrum import fixed_signs

__all__ = ["factored_svd", "orthonormal_range", "two_sided_svd"]


def orthonormal_range(matrix: Float[Tensor, "m q"]) -> Float[Tensor, "m q"]:
    """Orthonormal columns that span at least the columns of the matrix; q <= m."""
    basis: Tensor = torch.linalg.qr(_wide(matrix)).Q
    return basis


def factored_svd(
    left: Float[Tensor, "m q"], right: Float[Tensor, "q n"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """The singular triples of left @ right without the product, by QR of both and an SVD of their core.

    Args:
        left: [m, q], q <= m.
        right: [q, n], q <= n.

    Returns:
        (U [m, q], S [q] falling, Vh [q, n]) with fixed signs.
    """
    columns, upper = torch.linalg.qr(_wide(left))
    rows, lower = torch.linalg.qr(_wide(right).mT)
    U, S, Vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    U, Vh = fixed_signs(columns @ U, Vh @ rows.mT)
    return U, S, Vh


def two_sided_svd(
    products: Float[Tensor, "m q"], left_products: Float[Tensor, "l n"], left_rows: Float[Tensor, "l m"]
) -> tuple[Float[Tensor, "m q"], Float[Tensor, " q"], Float[Tensor, "q n"]]:
    """The singular triples of the G behind Y = G P^T and Z = Psi G, both taken in one pass: Q (Psi Q)^+ Z, Q of Y.

    The error is near that of the range Q itself where l is about 2 q, and grows without bound as l nears q.

    Args:
        products: Y [m, q] = G P^T with a random P [q, n].
        left_products: Z [l, n] = Psi G.
        left_rows: Psi [l, m], random and independent of P; q <= l <= m.

    Returns:
        (U [m, q], S [q] falling, Vh [q, n]) with fixed signs.

    Source: Tropp, Yurtsever, Udell, Cevher, arXiv 1609.00048, the low-rank approximation from the range and co-range
    sketches.
    """
    basis = orthonormal_range(products)
    directions, triangle = torch.linalg.qr(_wide(left_rows) @ basis)
    core = torch.linalg.solve_triangular(triangle, directions.mT @ _wide(left_products), upper=True)
    return factored_svd(basis, core)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()
