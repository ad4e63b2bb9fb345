"""How lora_A may start: random draws of a generator, and the leading singular rows of a matrix."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.linalg.random import kaiming_uniform
from rankwise.linalg.spectrum import truncated_svd

__all__ = ["Initialization", "draw_factor", "singular_rows"]

Initialization = Literal["kaiming", "default_normal", "normal", "orthogonal", "weight_svd", "grad_svd"]


def draw_factor(kind: Initialization, rows: int, in_features: int, source: torch.Generator) -> Float[Tensor, "rows in"]:
    """The random factor on the input side, float32 on the CPU; fewer rows are the first of more.

    Orthogonal rows are so up to rounding only: draw as many as calibration did and take the first.

    Source: hhnqqq/MyTransformers 4037d4d; the paper's A0 [m, r] is its transpose.
    """
    if kind in ("default_normal", "normal"):
        deviation = 0.02 if kind == "normal" else 1.0 / math.sqrt(in_features)
        return torch.stack([torch.randn(in_features, generator=source) * deviation for _ in range(rows)])
    if kind == "orthogonal":
        Q, R = torch.linalg.qr(torch.randn(in_features, rows, generator=source, dtype=torch.float64))
        rows_of_q: Tensor = (Q * R.diagonal().sign()).mT
        return rows_of_q.float().contiguous()
    return kaiming_uniform(rows, in_features, source)


def singular_rows(matrix: Float[Tensor, "out in"], rank: int, source: torch.Generator) -> Float[Tensor, "rank in"]:
    """diag(sigma_1..r) V_r^T of W or G, by a randomized SVD of 16 power iterations.

    Source: hhnqqq/MyTransformers 4037d4d, `weight_svd` and `grad_svd`.
    """
    _, singular, Vh = truncated_svd(matrix, rank, generator=source, power_iterations=16)
    return singular[:, None] * Vh
