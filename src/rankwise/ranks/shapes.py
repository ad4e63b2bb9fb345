"""What a rank costs in one layer, and what multiplies the product of the factors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["LayerShape", "ScalingRule", "uniform_budget"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One adapted linear layer as the rank arithmetic sees it.

    Args:
        name: the full dotted name, relative to the base model.
        out_features: rows of the weight W [out, in].
        in_features: columns of the weight.
    """

    name: str
    out_features: int
    in_features: int

    @property
    def cost(self) -> int:
        """Parameters of one rank: in + out."""
        return self.in_features + self.out_features

    @property
    def max_rank(self) -> int:
        """The largest rank that an update of this layer can have."""
        return min(self.in_features, self.out_features)


def uniform_budget(shapes: Sequence[LayerShape], r: int) -> int:
    """Parameters of a uniform LoRA of rank `r` on these layers: what `r: 8` promises not to exceed."""
    return r * sum(shape.cost for shape in shapes)


class ScalingRule(StrEnum):
    """The multiplier of lora_B @ lora_A; `rank` is the layer's own rank, `r` the budget's reference rank."""

    ALPHA_OVER_RANK = "alpha/rank"
    ALPHA_OVER_SQRT_RANK = "alpha/sqrt(rank)"
    ALPHA_OVER_R = "alpha/r"
    ALPHA_OVER_SQRT_R = "alpha/sqrt(r)"

    @property
    def rank_stabilized(self) -> bool:
        """Whether PEFT's `use_rslora` expresses the rule."""
        return self in (ScalingRule.ALPHA_OVER_SQRT_RANK, ScalingRule.ALPHA_OVER_SQRT_R)

    @property
    def own_rank(self) -> bool:
        """Whether the layer's own rank divides, rather than the reference rank."""
        return self in (ScalingRule.ALPHA_OVER_RANK, ScalingRule.ALPHA_OVER_SQRT_RANK)

    def divisor(self, rank: int, r: int) -> float:
        """The scale rank: what alpha is divided by for a layer of rank `rank` under the reference rank `r`."""
        base = rank if self.own_rank else r
        return math.sqrt(base) if self.rank_stabilized else float(base)

    def scaling(self, lora_alpha: float, rank: int, r: int) -> float:
        """The multiplier for a layer of rank `rank` (>= 1) under the reference rank `r` (>= 1)."""
        return lora_alpha / self.divisor(rank, r)
