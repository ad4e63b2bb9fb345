"""Leading singular vectors, reproducible down to their signs."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["fixed_signs", "truncated_svd"]


def truncated_svd(
    matrix: Float[Tensor, "*b m n"],
    rank: int,
    *,
    generator: torch.Generator,
    oversample: int = 8,
    power_iterations: int = 4,
) -> tuple[Float[Tensor, "*b m k"], Float[Tensor, "*b k"], Float[Tensor, "*b k n"]]:
    """The `rank` leading singular triples, by a randomized range finder; exact where that costs no more.

    The error falls with (sigma_(rank+oversample+1) / sigma_rank)^(2 * power_iterations + 1).

    Args:
        matrix: [..., m, n], finite; float32 or wider is kept, narrower is widened to float32.
        rank: k, from 1 to min(m, n).
        generator: a CPU generator for the random start (`linalg.random.generator`).
        oversample: columns beyond `rank` in the random range, >= 0.
        power_iterations: multiplications with M M^T, each followed by QR, >= 0.

    Returns:
        (U [..., m, k], S [..., k] falling, Vh [..., k, n]) with fixed signs, on the matrix's device.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061v2, algorithms 4.4 and 5.1.
    """
    rows, columns = matrix.shape[-2:]
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank is {rank}: a {rows} x {columns} matrix has 1 to {min(rows, columns)} singular values")
    M = matrix if matrix.dtype == torch.float64 else matrix.float()
    width = rank + oversample
    # From a third of the smaller side on, the small decompositions cost as much as one exact SVD.
    if 3 * width >= min(rows, columns):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        start = torch.randn((*matrix.shape[:-2], columns, width), generator=generator).to(M)
        basis = torch.linalg.qr(M @ start).Q
        for _ in range(power_iterations):
            basis = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ basis).Q).Q
        core_U, S, Vh = torch.linalg.svd(basis.mT @ M, full_matrices=False)
        U = basis @ core_U
    U, Vh = fixed_signs(U[..., :rank], Vh[..., :rank, :])
    return U, S[..., :rank], Vh


def fixed_signs(
    U: Float[Tensor, "*b m k"], Vh: Float[Tensor, "*b k n"]
) -> tuple[Float[Tensor, "*b m k"], Float[Tensor, "*b k n"]]:
    """The same triples with the entry of largest magnitude in each column of U (the first of equal ones) positive."""
    where = U.abs().argmax(dim=-2, keepdim=True)
    positive = U.gather(-2, where) >= 0
    signs = torch.where(positive, torch.ones_like(U[..., :1, :]), -torch.ones_like(U[..., :1, :]))
    return U * signs, Vh * signs.mT
