"""LoRA: the neutral method, and what every slot that nobody fills behaves as.

"LoRA: Low-Rank Adaptation of Large Language Models", Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen,
arXiv 2106.09685v2.

The idea: the change that fine-tuning makes to a weight W is well described by a product of two thin matrices. lora_A
starts random and lora_B at zero, so that training starts from the base model itself. Only the two factors are trained.

| paper | here |
|---|---|
| section 4.1, one rank r for all layers | `uniform_ranks` |
| section 4.1, W0 x + B A x scaled by alpha / r | `LoRA.scaling_rule` |
| section 4.1, random A, zero B | `LoRA.initialize` |

Departure: the paper's text draws A from a Gaussian; the authors' code and PEFT draw it Kaiming-uniform with
a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)), and so does this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rankwise.calibration.statistics import GradientStatistics
from rankwise.errors import BudgetError
from rankwise.linalg.random import generator, kaiming_uniform
from rankwise.methods.base import Allocation, Budget, Factors, Method, Slot, Start
from rankwise.ranks.shapes import LayerShape, ScalingRule

__all__ = ["LoRA", "uniform_ranks"]


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Plain LoRA: one rank everywhere, Kaiming lora_A, zero lora_B, scaling alpha / rank. It has no settings.

    It fills no slot: it is what unfilled slots do, so a recipe of several methods never names it.
    """

    id: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA: Low-Rank Adaptation of Large Language Models"
    source: ClassVar[str] = "arXiv:2106.09685v2"
    slots: ClassVar[frozenset[Slot]] = frozenset()
    learning_rates: ClassVar[tuple[float, float, float]] = (5e-5, 2e-4, 1e-3)

    def allocate(
        self, layers: Sequence[LayerShape], budget: Budget, statistics: GradientStatistics | None
    ) -> Allocation:
        """The reference rank for every layer.

        Raises:
            BudgetError: if the rank is above a layer's size; every such layer is listed.
        """
        ranks = uniform_ranks(layers, budget.r)
        return Allocation(ranks=ranks, importance=None, reasons=(f"uniform rank {budget.r}",) * len(ranks))

    def scaling_rule(self) -> ScalingRule:
        """Alpha / rank, with each layer's own rank as PEFT does."""
        return ScalingRule.ALPHA_OVER_RANK

    def initialize(self, start: Start) -> Factors:
        """Kaiming-uniform lora_A from the layer's own generator, zero lora_B."""
        shape = start.layer.shape
        lora_A = kaiming_uniform(start.rank, shape.in_features, generator(start.seed, "lora_A", shape.name))
        return Factors(start.dtype_cast(lora_A), torch.zeros(shape.out_features, start.rank))


def uniform_ranks(layers: Sequence[LayerShape], r: int) -> tuple[int, ...]:
    """The rank `r` for every layer.

    Args:
        layers: the targets, in their order.
        r: the rank asked for, >= 1.

    Returns:
        One rank a layer.

    Raises:
        BudgetError: if `r` is above the size of a layer: a rank that was asked for is never lowered silently.

    Source: arXiv 2106.09685v2, section 4.1.
    """
    faults = [
        f"r: {r} is above the size of layer {layer.name} ({layer.out_features} x {layer.in_features}); "
        f"at most {layer.max_rank} is possible there. Lower r or leave the layer out of target_modules"
        for layer in layers
        if r > layer.max_rank
    ]
    if faults:
        raise BudgetError(faults)
    return (r,) * len(layers)
