"""RoRA: a preset over rsLoRA.

"RoRA: Efficient Fine-Tuning of LLM with Reliability Optimization for Rank Adaptation", arXiv 2501.04315v2
(ICASSP 2025).

The idea: with the scaling alpha / rank the gains of LoRA stop or reverse as the rank grows. RoRA's "optimization
scaling" is alpha / sqrt(rank) instead, so that the gradient of lora_B at the start keeps its norm whatever the rank.
Nothing else changes: forward, gradients and export are those of rsLoRA (arXiv 2312.03732), PEFT's `use_rslora=True`.

| paper | here |
|---|---|
| optimization scaling, alpha / sqrt(rank) | `RoRA.scaling_rule` |
| the plain LoRA that computes the same | `equivalent_alpha` |

Departures: none known. Only the abstract and a summary of the paper could be obtained and the authors published no
code; with uneven ranks each layer divides by the root of its own rank, as PEFT does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rankwise.methods.base import Budget, Method, Slot
from rankwise.ranks.shapes import ScalingRule

__all__ = ["RoRA", "equivalent_alpha"]

PAPER_ALPHA = 16


@dataclass(frozen=True, kw_only=True)
class RoRA(Method):
    """Scales every update by alpha / sqrt(rank). It has no settings; the paper keeps lora_alpha at 16 for all ranks."""

    id: ClassVar[str] = "rora"
    title: ClassVar[str] = "RoRA: Efficient Fine-Tuning of LLM with Reliability Optimization for Rank Adaptation"
    source: ClassVar[str] = "arXiv:2501.04315v2"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.SCALE})
    learning_rates: ClassVar[tuple[float, float, float]] = (2e-5, 1e-4, 5e-4)

    def scaling_rule(self) -> ScalingRule:
        """Alpha / sqrt(rank), with each layer's own rank."""
        return ScalingRule.ALPHA_OVER_SQRT_RANK

    def notes(self, ranks: Mapping[str, int], budget: Budget) -> tuple[str, ...]:
        """The alpha of a plain LoRA with the same scaling, and a word if lora_alpha is not the paper's."""
        live = sorted({rank for rank in ranks.values() if rank > 0})
        pairs = ", ".join(f"rank {rank}: {equivalent_alpha(budget.lora_alpha, rank):.6g}" for rank in live)
        told: tuple[str, ...] = (
            f"rora: lora_alpha {budget.lora_alpha:g} here equals a plain LoRA with lora_alpha at {pairs}",
        )
        if budget.lora_alpha != PAPER_ALPHA:
            told += (f"rora: lora_alpha is {budget.lora_alpha:g}; the paper keeps {PAPER_ALPHA} at every rank",)
        return told


def equivalent_alpha(lora_alpha: float, rank: int) -> float:
    """The alpha with which plain LoRA (alpha / rank) has the scaling alpha / sqrt(rank): alpha * sqrt(rank).

    Args:
        lora_alpha: the alpha under RoRA, > 0.
        rank: the layer's rank, >= 1.

    Returns:
        The plain alpha.

    Source: arXiv 2501.04315v2, abstract (alpha / sqrt(rank)); the same scaling as rsLoRA, arXiv 2312.03732.
    """
    return lora_alpha * math.sqrt(rank)
