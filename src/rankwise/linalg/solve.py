"""Small symmetric solves by eigendecomposition: pseudo-inverses, roots and Sylvester equations of rank x rank size.

All stack over leading dimensions, compute in float64 and return float32 (float64 where an input is float64) on the
inputs' device. Cholesky would be cheaper, but fails exactly at lora_B = 0, where every run starts.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["psd_inverse", "psd_roots", "solve_sylvester", "trace"]


def psd_inverse(
    matrix: Float[Tensor, "*b r r"], *, damping: float = 0.0, cutoff: float | None = None
) -> Float[Tensor, "*b r r"]:
    """(matrix + damping I)^-1 on the directions that the matrix has, 0 on the others.

    Args:
        matrix: symmetric positive semidefinite up to rounding [..., r, r]; only its symmetric part is used.
        damping: added to every kept eigenvalue, >= 0, absolute.
        cutoff: eigenvalues at or below cutoff * (the largest) count as 0; None: r * eps of the matrix's dtype (float32
            for narrower ones).

    Returns:
        The symmetric (pseudo-)inverse [..., r, r]; 0 for a zero matrix.
    """
    values, vectors, kept = _spectrum(matrix, cutoff)
    inverse = torch.where(kept, 1.0 / torch.where(kept, values + damping, 1.0), 0.0)
    return _compose(vectors, inverse, matrix)


def psd_roots(
    matrix: Float[Tensor, "*b r r"], *, cutoff: float | None = None
) -> tuple[Float[Tensor, "*b r r"], Float[Tensor, "*b r r"]]:
    """(matrix^(1/2), matrix^(-1/2)); eigenvalues below the cutoff count as 0 in both.

    Args:
        matrix: as in `psd_inverse`.
        cutoff: as in `psd_inverse`.

    Returns:
        Symmetric root and inverse root [..., r, r]; their product is the projector on the kept directions.
    """
    values, vectors, kept = _spectrum(matrix, cutoff)
    root = torch.where(kept, values.clamp(min=0), 0.0).sqrt()  # rounding can leave an eigenvalue just below 0
    inverse = torch.where(kept, 1.0 / torch.where(kept, root, 1.0), 0.0)
    return _compose(vectors, root, matrix), _compose(vectors, inverse, matrix)


def solve_sylvester(
    left: Float[Tensor, "*b m m"],
    right: Float[Tensor, "*b n n"],
    value: Float[Tensor, "*b m n"],
    *,
    damping: float = 0.0,
    cutoff: float | None = None,
) -> Float[Tensor, "*b m n"]:
    """The X of least norm with left X + X right = value, for symmetric positive semidefinite left and right.

    Args:
        left: [..., m, m].
        right: [..., n, n].
        value: [..., m, n].
        damping: added to each denominator l_i + r_j that is kept, >= 0, absolute.
        cutoff: denominators at or below cutoff * (the largest) give 0; None: max(m, n) * eps of the widest input dtype.

    Returns:
        X = U ((U^T value V) / (l_i + r_j)) V^T [..., m, n], with left = U diag(l) U^T and right = V diag(r) V^T.
    """
    left_values, U = torch.linalg.eigh(_symmetric(left))
    right_values, V = torch.linalg.eigh(_symmetric(right))
    sums = left_values.clamp(min=0).unsqueeze(-1) + right_values.clamp(min=0).unsqueeze(-2)
    epsilon = min(_epsilon(left), _epsilon(right)) * max(left.shape[-1], right.shape[-1])
    limit = (epsilon if cutoff is None else cutoff) * sums.amax(dim=(-2, -1), keepdim=True)
    kept = sums > limit
    turned = U.mT @ value.to(torch.float64) @ V
    solved = torch.where(kept, turned / torch.where(kept, sums + damping, 1.0), 0.0)
    solution: Tensor = U @ solved @ V.mT
    return solution.to(torch.promote_types(value.dtype, torch.float32))


def _spectrum(matrix: Tensor, cutoff: float | None) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    relative = matrix.shape[-1] * _epsilon(matrix) if cutoff is None else cutoff
    return values, vectors, values > relative * values[..., -1:].clamp(min=0)


def _compose(vectors: Tensor, values: Tensor, like: Tensor) -> Tensor:
    return ((vectors * values.unsqueeze(-2)) @ vectors.mT).to(torch.promote_types(like.dtype, torch.float32))


def _symmetric(matrix: Tensor) -> Tensor:
    wide = matrix.to(torch.float64)
    return (wide + wide.mT) / 2


def _epsilon(matrix: Tensor) -> float:
    return min(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float32).eps)


def trace(matrix: Float[Tensor, "*b r r"]) -> Float[Tensor, "*b"]:
    """The sum of the diagonal of each matrix of a stack, in the matrix's own dtype."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
