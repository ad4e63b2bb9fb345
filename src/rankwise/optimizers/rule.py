"""What a step rule is, and what the engine hands to it.

A rule is three pure functions with named state. `reduce` turns the tall tensors of one factor [rank, n] into products
of rank x rank size; `solve` does all the small algebra of the step, over every pair at once, in float64; `apply` moves
the factors by small matrices times tall tensors. Both factors are seen alike: lora_A as it is, lora_B transposed, so
that every tall tensor is "wide", [rank, n] with n = in or out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rankwise.optimizers.tall import Amount, Tall

__all__ = [
    "SIDES",
    "Block",
    "Coefficients",
    "FactorRule",
    "Half",
    "JointRule",
    "Measured",
    "PairView",
    "Side",
    "StepRule",
    "other",
]

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")

Measured = dict[str, Tensor]
"""What is known of every pair of a block before the rule solves: [N, r, r] or [N, r], by name, float64."""


def other(side: Side) -> Side:
    """The other half of a pair."""
    return "B" if side == "A" else "A"


@dataclass(slots=True, kw_only=True)
class Half:
    """One side of the pairs of a block.

    Args:
        products: what `reduce` returned, by name, float64; zero where a gradient is missing or not finite.
        state: the rule's small state by name, [N, r, r] or [N], float64; `solve` writes new values into it through
            `Block.keep_state`.
        steps: optimizer steps that each factor has made, this one included where it moves.
        moves: which factors move in this step.
        rate: their learning rate.
        edited: which factors something else wrote to since the last step; None if nothing did.
        length: n of each factor.
    """

    products: Mapping[str, Float[Tensor, "N r r"]]
    state: dict[str, Tensor]
    steps: Float[Tensor, " N"]
    moves: Bool[Tensor, " N"]
    rate: Float[Tensor, " N"]
    edited: Bool[Tensor, " N"] | None
    length: Float[Tensor, " N"]


@dataclass(slots=True, kw_only=True)
class Block:
    """Pairs whose small matrices lie in one stack [N, r, r]; smaller ranks are padded.

    Args:
        halves: both sides.
        rank: each pair's own rank.
        scaling: each layer's multiplier.
        hyper: by name (`beta1`, `beta2`, `eps`, `weight_decay`), each pair's value, float64.
        padding: True where an index is padding; None where nothing is padded.
        epsilon: the rounding of the computing type.
        on_host: whether looking at small tensors costs no wait. Elsewhere tall products are float64 and no pair is
            looked at again.
    """

    halves: Mapping[Side, Half]
    rank: Float[Tensor, " N"]
    scaling: Float[Tensor, " N"]
    hyper: Mapping[str, Float[Tensor, " N"]]
    padding: Bool[Tensor, "N r"] | None
    epsilon: float
    on_host: bool

    def gram(self, side: Side) -> Float[Tensor, "N r r"]:
        """F F^T of the factors; padding has the mean of the diagonal on its diagonal, so that it is harmless."""
        gram = self.halves[side].products["gram"]
        if self.padding is None:
            return gram
        mean = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / self.rank
        return gram + torch.diag_embed(self.padding * mean[:, None])

    @property
    def pair_moves(self) -> Bool[Tensor, " N"]:
        """Which pairs move at least one of their factors."""
        return self.halves["A"].moves | self.halves["B"].moves

    def keep_state(self, side: Side, name: str, value: Tensor) -> None:
        """Stores new state of one side for the pairs that move; the others keep theirs."""
        state = self.halves[side].state[name]
        state.copy_(torch.where(self.pair_moves.reshape(-1, *[1] * (value.ndim - 1)), value, state))

    @property
    def dead(self) -> Bool[Tensor, "N r"]:
        """Indices whose row of lora_A and column of lora_B are both zero, padding included: they stay so."""
        empty = [self.halves[side].products["gram"].diagonal(dim1=-2, dim2=-1) == 0 for side in SIDES]
        return empty[0] & empty[1]


@dataclass(slots=True)
class Coefficients:
    """What `solve` decided, for one side of a block.

    Args:
        matrices: [N, r, r] by name, as `apply` takes them.
        numbers: [N] by name.
    """

    matrices: dict[str, Float[Tensor, "N r r"]] = field(default_factory=dict)
    numbers: dict[str, Float[Tensor, " N"]] = field(default_factory=dict)


@dataclass(slots=True)
class PairView:
    """Both factors of one pair, for a second look: `tall` by side, and its rows of the small state."""

    tall: Mapping[Side, Tall]
    state: Mapping[Side, Mapping[str, Tensor]]
    epsilon: float


class StepRule(Protocol):
    """How pairs move; methods hold the rules. What moves is one factor (FactorRule) or a whole pair (JointRule)."""

    @property
    def tall_state(self) -> tuple[str, ...]:
        """Names of the state tensors of a factor's own shape."""
        ...

    @property
    def reduced_state(self) -> tuple[str, ...]:
        """Those of them that `reduce` reads."""
        ...

    @property
    def square_state(self) -> tuple[str, ...]:
        """Names of the state tensors [rank, rank], float64."""
        ...

    @property
    def number_state(self) -> Mapping[str, float]:
        """Names of the state numbers, float64, with their first values."""
        ...

    def reduce(self, tall: Tall) -> dict[str, Float[Tensor, "*k r r"]]:
        """Products of the tall tensors of one side: `gram` (F F^T), and at least one that holds the gradient."""
        ...

    def measure(self, block: Block) -> tuple[Measured, Bool[Tensor, " N"]]:
        """What `solve` needs of each pair, and which pairs are too ill-conditioned for products in this type."""
        ...

    def look_again(self, pair: PairView) -> Measured:
        """The same for one such pair, from its tall tensors; without the leading N."""
        ...

    def solve(self, blocks: Sequence[Block], measured: Sequence[Measured]) -> list[dict[Side, Coefficients]]:
        """The small algebra of all blocks; writes the small state of the factors that move."""
        ...


class FactorRule(StepRule, Protocol):
    """A rule that moves each factor by itself."""

    def still(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """The coefficients under which nothing moves: multiples of the identity by name, and numbers by name."""
        ...

    def apply(self, tall: Tall, matrices: Mapping[str, Tensor], numbers: Mapping[str, Amount]) -> None:
        """Moves the factors and the tall state of one side, of every pair that moves at least one of its factors."""
        ...


@runtime_checkable
class JointRule(StepRule, Protocol):
    """A rule whose pairs move as a whole, because their state is no factor's (dense moments)."""

    def pair_state(self, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
        """The state of one pair, kept under lora_B."""
        ...

    def apply_pair(
        self,
        tall: Mapping[Side, Tall],
        matrices: Mapping[Side, Mapping[str, Tensor]],
        numbers: Mapping[Side, Mapping[str, float]],
        state: Mapping[str, Tensor],
    ) -> None:
        """Moves both factors of one pair; coefficients as `solve` gave them, without the leading N."""
        ...
