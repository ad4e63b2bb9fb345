"""What is kept of a layer's gradient: running sums that never hold more than they were asked for.

A batch reaches a sink in one of two forms: as the factors of an outer product, gY [tokens, out] and X [tokens, in] with
dL/dW = gY.T @ X (collector `outer`), or as the finished gradient [out, in] (collector `param`). The sums are float32
wherever they are placed; the weight of a batch is its number of label tokens.
"""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["FullSum", "LeftProjection", "Projection", "RowSample", "Sink"]

OutputGrad = Float[Tensor, "tokens out"]
Inputs = Float[Tensor, "tokens in"]
Gradient = Float[Tensor, "out in"]


class Sink(Protocol):
    """A running weighted sum of something linear in the gradient, kept in `total`."""

    total: Tensor

    def add_outer(self, output_grad: OutputGrad, inputs: Inputs, weight: float) -> None:
        """Adds the term of the gradient output_grad.T @ inputs, times weight."""
        ...

    def add_gradient(self, gradient: Gradient, weight: float) -> None:
        """Adds the term of the finished gradient, times weight."""
        ...


class FullSum:
    """The whole gradient: sum of w * G [out, in].

    Args:
        out_features: rows.
        in_features: columns.
        device: where the sum lives; the product is always computed where the gradient is.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        self.total: Gradient = torch.zeros(out_features, in_features, device=device)

    def add_outer(self, output_grad: OutputGrad, inputs: Inputs, weight: float) -> None:
        """Adds w * gY.T @ X."""
        _add_product(self.total, output_grad, inputs, weight)

    def add_gradient(self, gradient: Gradient, weight: float) -> None:
        """Adds w * G."""
        self.total.add_(gradient.to(self.total.device), alpha=weight)


class RowSample:
    """Some rows of the gradient: sum of w * G[rows] [rows, in]; time and memory fall by rows / out.

    Source: gora.md 3.2 (row-sampled importance).

    Args:
        rows: the row numbers, int64 on the layer's device.
        in_features: columns.
        device: where the sum lives.
    """

    def __init__(self, rows: Tensor, in_features: int, device: torch.device) -> None:
        self.rows = rows
        self.total: Float[Tensor, "rows in"] = torch.zeros(len(rows), in_features, device=device)

    def add_outer(self, output_grad: OutputGrad, inputs: Inputs, weight: float) -> None:
        """Adds w * gY[:, rows].T @ X."""
        _add_product(self.total, output_grad.index_select(1, self.rows), inputs, weight)

    def add_gradient(self, gradient: Gradient, weight: float) -> None:
        """Adds w * G[rows]."""
        self.total.add_(gradient.index_select(0, self.rows).to(self.total.device), alpha=weight)


class Projection:
    """A right sketch of the gradient: sum of w * G @ P.T [out, k], without ever forming G.

    Source: gora.md 3.5 (memory-light identity).

    Args:
        rows: P [k, in], float32 on the layer's device.
        out_features: rows of the gradient.
    """

    def __init__(self, rows: Float[Tensor, "k in"], out_features: int) -> None:
        self.rows = rows
        self.total: Float[Tensor, "out k"] = torch.zeros(out_features, len(rows), device=rows.device)

    def add_outer(self, output_grad: OutputGrad, inputs: Inputs, weight: float) -> None:
        """Adds w * gY.T @ (X @ P.T), in P's dtype: a 16-bit P would be another projection than was asked for."""
        projected = inputs.to(self.rows.dtype) @ self.rows.T
        _add_product(self.total, output_grad.to(self.rows.dtype), projected, weight)

    def add_gradient(self, gradient: Gradient, weight: float) -> None:
        """Adds w * G @ P.T."""
        self.total.addmm_(gradient.to(self.rows.dtype), self.rows.T, alpha=weight)


class LeftProjection:
    """A left sketch of the gradient: sum of w * Q @ G [k, in], without ever forming G.

    Args:
        columns: Q [k, out], float32 on the layer's device.
        in_features: columns of the gradient.
    """

    def __init__(self, columns: Float[Tensor, "k out"], in_features: int) -> None:
        self.columns = columns
        self.total: Float[Tensor, "k in"] = torch.zeros(len(columns), in_features, device=columns.device)

    def add_outer(self, output_grad: OutputGrad, inputs: Inputs, weight: float) -> None:
        """Adds w * (gY @ Q.T).T @ X."""
        projected = output_grad.to(self.columns.dtype) @ self.columns.T
        _add_product(self.total, projected, inputs.to(self.columns.dtype), weight)

    def add_gradient(self, gradient: Gradient, weight: float) -> None:
        """Adds w * Q @ G."""
        self.total.addmm_(self.columns, gradient.to(self.columns.dtype), alpha=weight)


def _add_product(
    total: Float[Tensor, "m n"], left: Float[Tensor, "tokens m"], right: Float[Tensor, "tokens n"], weight: float
) -> None:
    """Adds weight * left.T @ right to the total, in one pass over it when dtype and device allow."""
    if total.dtype == left.dtype and total.device == left.device:
        total.addmm_(left.T, right, alpha=weight)
    else:
        # 16-bit products are rounded once, as autograd rounds its own weight gradient; only the sum is wide.
        total.add_((left.T @ right).to(total.device), alpha=weight)
