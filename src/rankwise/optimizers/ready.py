"""Coefficients on their way from the solution of a step to the factors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.optimizers.rule import Block, Coefficients, Side
from rankwise.optimizers.stacks import Chunk

__all__ = ["Ready"]


class Ready:
    """The coefficients of one side of a block in the computing type; those of standing pairs move nothing.

    On a CPU the host knows which pairs and factors stand, and has the numbers.

    Args:
        decided: what the rule decided.
        dtype: the computing type.
        block: which pairs and factors move.
        side: the side.
        still: the coefficients under which nothing moves (see FactorRule.still).
    """

    def __init__(
        self,
        decided: Coefficients,
        dtype: torch.dtype,
        block: Block,
        side: Side,
        still: tuple[Mapping[str, float], Mapping[str, float]],
    ) -> None:
        self.pair_moves = block.pair_moves
        self._stays: list[bool] | None = None
        self._still: list[bool] | None = None
        if block.on_host:
            stays, stand = (~self.pair_moves).tolist(), (~block.halves[side].moves).tolist()
            self._stays, self._still = stays if any(stays) else None, stand if any(stand) else None
        self.some_stay = not block.on_host or self._stays is not None
        matrices, numbers = decided.matrices, decided.numbers
        if self.some_stay:
            moves = self.pair_moves
            matrices = {
                name: torch.where(moves[:, None, None], matrix, still[0][name] * _identity_like(matrix))
                for name, matrix in matrices.items()
            }
            numbers = {name: torch.where(moves, value, still[1][name]) for name, value in numbers.items()}
        self._matrices = {name: matrix.to(dtype) for name, matrix in matrices.items()}
        self._numbers = {name: value.to(dtype) for name, value in numbers.items()}
        self._rank = next(iter(matrices.values())).shape[-1]
        # Only a CPU works on factors one by one.
        self._slots: list[tuple[dict[str, Tensor], dict[str, float]]] = []
        self._steps: tuple[Tensor, ...] = ()
        if block.on_host:
            rows = zip(*(matrix.unbind(0) for matrix in self._matrices.values()), strict=True)
            values = zip(*(value.tolist() for value in numbers.values()), strict=True)
            self._slots = [
                (dict(zip(matrices, row, strict=True)), dict(zip(numbers, own, strict=True)))
                for row, own in zip(rows, values, strict=True)
            ]
            self._steps = block.halves[side].steps.float().unbind(0)

    def staying(self, chunk: Chunk) -> list[bool] | None:
        """Which of a chunk's pairs stand, where the host knows that some do."""
        return None if self._stays is None else [self._stays[slot] for slot in chunk.slots]

    def moving(self, chunk: Chunk) -> list[int] | None:
        """The places in a chunk whose factor moves, where the host knows that some do not."""
        if self._still is None:
            return None
        return [place for place, slot in enumerate(chunk.slots) if not self._still[slot]]

    def steps(self, chunk: Chunk) -> list[Tensor] | None:
        """How many steps each factor of a chunk has made, this one included; None where the host does not know."""
        return [self._steps[slot] for slot in chunk.slots] if self._steps else None

    def of(self, chunk: Chunk) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """A chunk's matrices, [r, r] or [k, r, r], and numbers: plain ones on a CPU for one factor, else [k, 1, 1]."""
        r = chunk.rank
        matrices: Mapping[str, Tensor]
        numbers: Mapping[str, Any]
        if chunk.single:
            matrices, numbers = self._slots[chunk.slots[0]]
        else:
            matrices = {name: matrix.index_select(0, chunk.index) for name, matrix in self._matrices.items()}
            numbers = {n: v.index_select(0, chunk.index)[:, None, None] for n, v in self._numbers.items()}
        if self._rank > r:
            matrices = {name: matrix[..., :r, :r] for name, matrix in matrices.items()}
        return matrices, numbers


def _identity_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
