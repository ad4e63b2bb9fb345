"""Factored updates lora_B @ lora_A: project, stack, balance, compress and compare them without the dense product.

Everything is computed in float32 or wider and returned as float32 (float64 where an input is float64), on the inputs'
device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.linalg.spectrum import fixed_signs

__all__ = [
    "Compression",
    "balance",
    "compress",
    "product_norm",
    "project_onto_rows",
    "regress_dense_on_rows",
    "regress_on_rows",
    "relative_difference",
    "stack",
]


def project_onto_rows(matrix: Float[Tensor, "*b m n"], rows: Float[Tensor, "*b r n"]) -> Float[Tensor, "*b m n"]:
    """Projects each row of the matrix on the row space of `rows`: matrix @ (rows^+ rows).

    Args:
        matrix: G [..., m, n].
        rows: A [..., r, n].

    Returns:
        G Pi_A [..., m, n].

    Source: GoRA, arXiv 2502.12171v3, Eq. 9 and 10 (Pi_A = A^T (A A^T)^-1 A).
    """
    basis = _row_basis(rows)[0].to(_working(matrix, rows))
    return (_wide(matrix, rows) @ basis.mT) @ basis


def regress_on_rows(products: Float[Tensor, "*b m r"], rows: Float[Tensor, "*b r n"]) -> Float[Tensor, "*b m r"]:
    """The B that minimizes ||G - B A||_F, from the products G A^T alone: G A^+.

    With A^T = Q R (QR, never the Gram matrix A A^T): G A^+ = (G A^T) R^-1 R^-T. Rounding in the products grows with the
    squared condition number of A; where G is at hand, `regress_dense_on_rows` loses only the condition number.

    Args:
        products: G A^T [..., m, r].
        rows: A [..., r, n]. If it has not full row rank, a relative ridge bounds the result.

    Returns:
        G A^+ [..., m, r].

    Source: GoRA, arXiv 2502.12171v3, Eq. 9.
    """
    triangle = torch.linalg.qr(_extended(rows), mode="r").R
    wide = products.to(torch.float64)
    half = torch.linalg.solve_triangular(triangle, wide, upper=True, left=False)  # (G A^T) R^-1
    return _narrow(_times_inverse_transpose(half, triangle), products, rows)


def regress_dense_on_rows(matrix: Float[Tensor, "*b m n"], rows: Float[Tensor, "*b r n"]) -> Float[Tensor, "*b m r"]:
    """The B that minimizes ||G - B A||_F, from G itself: (G Q) R^-T with A^T = Q R.

    Args:
        matrix: G [..., m, n].
        rows: A [..., r, n]. If it has not full row rank, a relative ridge bounds the result.

    Returns:
        G A^+ [..., m, r].

    Source: GoRA, arXiv 2502.12171v3, Eq. 9.
    """
    basis, triangle = _row_basis(rows)
    # The large product G Q stays in the working precision; only [r, n] and [m, r] arrays become float64.
    coordinates = _wide(matrix, rows) @ basis.to(_working(matrix, rows)).mT
    return _narrow(_times_inverse_transpose(coordinates.to(torch.float64), triangle), matrix, rows)


def stack(
    parts: Sequence[tuple[Float[Tensor, "_ n"], Float[Tensor, "m _"], float]],
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """One pair of factors, of scaling 1, whose product is the sum of the parts' updates.

    Args:
        parts: (lora_A [r_i, n], lora_B [m, r_i], scaling), at least one.

    Returns:
        (lora_A [r, n], lora_B [m, r]) with r the sum of the r_i; each scaling is folded into its columns of lora_B.
    """
    if not parts:
        raise ValueError("no parts to stack: at least one (lora_A, lora_B, scaling) is needed")
    tensors = [tensor for lora_A, lora_B, _ in parts for tensor in (lora_A, lora_B)]
    dtype = _working(*tensors)
    rows = torch.cat([lora_A.to(dtype) for lora_A, _, _ in parts], dim=0)
    columns = torch.cat([lora_B.to(dtype) * scaling for _, lora_B, scaling in parts], dim=1)
    return rows, columns


def balance(
    lora_A: Float[Tensor, "*b r n"], lora_B: Float[Tensor, "*b m r"]
) -> tuple[Float[Tensor, "*b r n"], Float[Tensor, "*b m r"]]:
    """The same product with each row of lora_A and its column of lora_B of about equal norm (within a factor of 2).

    The factors are moved by powers of two, so that no bit of the product changes. A rank whose row or column is
    zero is left alone.
    """
    A, B = _wide(lora_A, lora_B), _wide(lora_B, lora_A)
    row = A.to(torch.float64).norm(dim=-1)
    column = B.to(torch.float64).norm(dim=-2)
    ratio = torch.where((row > 0) & (column > 0), row / column, torch.ones_like(row))
    exponent = (ratio.log2() / 2).round()
    factor = torch.exp2(exponent).to(A.dtype)
    return A / factor.unsqueeze(-1), B * factor.unsqueeze(-2)


@dataclass(frozen=True, slots=True)
class Compression:
    """Factors of lower rank and what they lost.

    Args:
        lora_A: [k, n].
        lora_B: [m, k].
        discarded: the relative error of the product, sqrt(sum of discarded sigma^2) / ||product||, in [0, 1].
    """

    lora_A: Float[Tensor, "k n"]  # noqa: N815
    lora_B: Float[Tensor, "m k"]  # noqa: N815
    discarded: float


def compress(
    lora_A: Float[Tensor, "r n"], lora_B: Float[Tensor, "m r"], rank: int | None = None, *, tolerance: float = 1e-6
) -> Compression:
    """The best product of lower rank (Eckart-Young), by QR of both factors and an SVD of their small core.

    The singular values are split evenly between the factors; signs are fixed, so the result is reproducible.

    Args:
        lora_A: [r, n].
        lora_B: [m, r], the scaling folded in.
        rank: the rank to keep, >= 1; None keeps the smallest rank whose relative error is at most `tolerance`.
        tolerance: relative error allowed where `rank` is None, in [0, 1); the default drops only what
            float32 cannot hold.

    Returns:
        Factors of rank at most `rank` (fewer where the product has fewer, 0 for a zero product).
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}: at least one rank must be kept")
    rows_basis, rows_core = torch.linalg.qr(lora_A.to(torch.float64).mT)
    columns_basis, columns_core = torch.linalg.qr(lora_B.to(torch.float64))
    U, S, Vh = torch.linalg.svd(columns_core @ rows_core.mT, full_matrices=False)
    U, Vh = fixed_signs(columns_basis @ U, Vh @ rows_basis.mT)
    tails = S.square().flip(0).cumsum(0).flip(0).sqrt().tolist()  # tails[k]: the error of keeping k values
    tails.append(0.0)
    norm = tails[0]
    # What lies below the rounding of the core is not a rank of the product.
    noise = norm * torch.finfo(torch.float64).eps * max(*S.shape, 1)
    allowed = max(tolerance * norm if rank is None else 0.0, noise)
    keep = next(k for k, tail in enumerate(tails) if tail <= allowed)
    keep = keep if rank is None else min(keep, rank)
    root = S[:keep].sqrt()
    return Compression(
        lora_A=_narrow(root.unsqueeze(1) * Vh[:keep], lora_A, lora_B),
        lora_B=_narrow(U[:, :keep] * root, lora_A, lora_B),
        discarded=tails[keep] / norm if norm > 0 else 0.0,
    )


def product_norm(lora_A: Float[Tensor, "r n"], lora_B: Float[Tensor, "m r"]) -> float:
    """||lora_B @ lora_A||_F to float64 rounding, from the triangles of both QR decompositions."""
    return float(torch.linalg.matrix_norm(_core(lora_A, lora_B)))


def relative_difference(
    first: tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]], second: tuple[Float[Tensor, "k n"], Float[Tensor, "m k"]]
) -> float:
    """||first - second||_F / ||second||_F of two factored updates, right down to differences of 1e-15.

    The difference is itself a factored update, [B1, -B2] [A1; A2]; its norm comes from the QR of the stacked factors,
    not from norms of differences of Gram matrices, which would lose half of the digits.

    Args:
        first: (lora_A, lora_B), scaling folded in.
        second: (lora_A, lora_B) of the reference, scaling folded in; its rank may differ.

    Returns:
        The relative difference; 0.0 where both updates are zero, inf where only the reference is.
    """
    (A1, B1), (A2, B2) = ((A.to(torch.float64), B.to(torch.float64)) for A, B in (first, second))
    difference = product_norm(*stack([(A1, B1, 1.0), (A2, B2, -1.0)]))
    reference = product_norm(A2, B2)
    if reference > 0:
        return difference / reference
    return math.inf if difference > 0 else 0.0


def _core(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    rows_core = torch.linalg.qr(lora_A.to(torch.float64).mT, mode="r").R
    columns_core = torch.linalg.qr(lora_B.to(torch.float64), mode="r").R
    core: Tensor = columns_core @ rows_core.mT
    return core


def _extended(rows: Tensor) -> Tensor:
    """rows^T in float64, extended by a relative ridge where `rows` lacks full row rank: [..., n or n + r, r].

    The triangle R of its QR has R^T R = A A^T + ridge^2 I. ridge = sqrt(eps) * ||A||_2 holds directions of size
    eps * ||A||_2 down to O(1) and costs the others (ridge / sigma)^2.
    """
    wide = rows.to(torch.float64).mT
    columns, rank = wide.shape[-2:]
    epsilon = min(torch.finfo(rows.dtype).eps, torch.finfo(torch.float32).eps)
    # The singular values of a tall matrix are those of its triangle, which is much cheaper to decompose.
    singular = torch.linalg.svdvals(torch.linalg.qr(wide, mode="r").R)
    largest = singular[..., 0]
    deficient = torch.full_like(largest, rank > columns, dtype=torch.bool)
    deficient |= singular[..., -1] <= 10 * epsilon * largest
    if not bool(deficient.any()):
        return wide
    ridge = torch.where(deficient, largest * math.sqrt(epsilon), torch.zeros_like(largest))
    ridge = torch.where(largest > 0, ridge, torch.ones_like(ridge))
    identity = torch.eye(rank, dtype=torch.float64, device=rows.device)
    return torch.cat([wide, ridge[..., None, None] * identity], dim=-2)


def _row_basis(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(Q^T [..., r, n], R [..., r, r]) of rows^T = Q R in float64."""
    Q, R = torch.linalg.qr(_extended(rows))
    return Q[..., : rows.shape[-1], :].mT, R


def _times_inverse_transpose(left: Tensor, triangle: Tensor) -> Tensor:
    """Left @ triangle^-T."""
    solved: Tensor = torch.linalg.solve_triangular(triangle.mT, left, upper=False, left=False)
    return solved


def _working(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _wide(tensor: Tensor, *others: Tensor) -> Tensor:
    return tensor.to(_working(tensor, *others))


def _narrow(result: Tensor, *inputs: Tensor) -> Tensor:
    return result.to(_working(*inputs))
