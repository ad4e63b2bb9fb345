"""Products of thin matrices at the speed of square ones: one factor, or a stack of equal ones, seen as [rank, n]."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Amount", "Tall", "packing"]

Amount = float | Tensor
"""A number for one factor, or one for each factor of a stack."""

_WIDE_ENOUGH = 16


def packing(rank: int, length: int) -> int:
    """How many rows of lora_B [n, rank] are read as one, so that products have an inner size near 16.

    BLAS is several times slower on [n, 8] than on the same memory read as [n / 2, 16], which costs twice the
    operations (measured: 2.1 against 0.5 ns an element).
    """
    return next((p for p in range(_WIDE_ENOUGH // rank, 1, -1) if length % p == 0), 1) if rank < _WIDE_ENOUGH else 1


@dataclass(slots=True, eq=False)
class Tall:
    """The tensors of one factor (2-D) or of a stack of factors of one shape (3-D), in the factor's own layout.

    Every method speaks of the wide form: x stands for [rank, n], which is x itself for lora_A and its transpose for
    lora_B.

    Args:
        factor: what is trained, in the computing type.
        grad: its gradient, in the computing type.
        state: the rule's tall state by name.
        wide: whether the layout is [rank, n] (lora_A) or [n, rank] (lora_B).
        hyper: the settings of the parameter group.
        moving: the places in the stack whose factor moves, where some do not and the host knows; None where all may.
        scratch: where results of a chunk may lie for as long as the chunk is worked on; None for new memory.
        steps: for each factor, how many steps it has made, this one included, where the host knows; else None.
    """

    factor: Tensor
    grad: Tensor
    state: Mapping[str, Tensor]
    wide: bool
    hyper: Mapping[str, float] = field(default_factory=dict)
    moving: Sequence[int] | None = None
    scratch: Callable[[str], Tensor] | None = None
    steps: Sequence[Tensor] | None = None
    rank: int = field(init=False)
    length: int = field(init=False)
    _pack: int = field(init=False)
    _rooms: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, columns = self.factor.shape[-2:]
        self.rank, self.length = (rows, columns) if self.wide else (columns, rows)
        self._pack = 1 if self.wide else packing(self.rank, self.length)

    def to(self, dtype: torch.dtype, names: Sequence[str]) -> "Tall":
        """The same in another type, for products only, with the named state alone."""
        state = {name: self.state[name].to(dtype) for name in names}
        return Tall(self.factor.to(dtype), self.grad.to(dtype), state, self.wide, self.hyper)

    def room(self, name: str) -> Tensor | None:
        """Memory of the factor's shape for a result, or None where new memory is as good."""
        if self.scratch is None:
            return None
        if name not in self._rooms:
            self._rooms[name] = self.scratch(name)
        return self._rooms[name]

    def product(self, x: Tensor, y: Tensor) -> Float[Tensor, "*k r r"]:
        """X y^T of two tensors of the factor's layout."""
        if self.wide:
            return _multiply(x, y.mT)
        p = self._pack
        whole = _multiply(_packed(x, p).mT, _packed(y, p))
        if p == 1:
            return whole
        parts = whole.view(*whole.shape[:-2], p, self.rank, p, self.rank)
        return parts.diagonal(dim1=-4, dim2=-2).sum(-1)

    def combine(self, matrix: Float[Tensor, "*k r r"], x: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns matrix x in the factor's layout, in new memory or in `out`."""
        if self.wide:
            return _multiply(matrix, x, out)
        p = self._pack
        packed = None if out is None else _packed(out, p)
        return _multiply(_packed(x, p), _repeated(matrix.mT, p), packed).view(x.shape)

    def add_combined(self, total: Tensor, matrix: Float[Tensor, "*k r r"], x: Tensor) -> None:
        """Adds matrix x to `total` in place."""
        if self.wide:
            _add_product(total, matrix, x)
            return
        p = self._pack
        _add_product(_packed(total, p), _packed(x, p), _repeated(matrix.mT, p))

    def subtract(self, x: Tensor, amount: Amount) -> None:
        """Takes amount x from the factor."""
        if isinstance(amount, float):
            self.factor.add_(x, alpha=-amount)
        else:
            self.factor.addcmul_(x, amount, value=-1)

    def shrink(self, amount: Amount) -> None:
        """Multiplies the factor by the amount."""
        if not isinstance(amount, float) or amount != 1.0:
            self.factor.mul_(amount)


def _packed(x: Tensor, p: int) -> Tensor:
    return x if p == 1 else x.reshape(*x.shape[:-2], x.shape[-2] // p, p * x.shape[-1])


def _repeated(matrix: Tensor, p: int) -> Tensor:
    """The matrix p times on a diagonal of blocks."""
    if p == 1:
        return matrix
    r = matrix.shape[-1]
    whole = matrix.new_zeros(*matrix.shape[:-2], p * r, p * r)
    whole.view(*matrix.shape[:-2], p, r, p, r).diagonal(dim1=-4, dim2=-2).copy_(matrix.unsqueeze(-1))
    return whole


def _multiply(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, y, out=out) if x.ndim == 2 else torch.bmm(x, y, out=out)


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    if x.ndim == 2:
        total.addmm_(x, y)
    else:
        total.baddbmm_(x, y)
