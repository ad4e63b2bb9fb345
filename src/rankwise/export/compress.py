"""Fewer ranks than were trained, and what that loses: never silent, in all and by layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rankwise.errors import ConfigError
from rankwise.export.fold import FoldedAdapter, FoldedLayer
from rankwise.linalg.factors import compress, product_norm

__all__ = ["CompressedAdapter", "compress_adapter"]

_MUCH = 0.05
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedAdapter:
    """What re-compression discarded.

    Args:
        max_rank: the largest rank kept.
        discarded: by layer that had more ranks, the relative error of its update, sqrt(sum of discarded sigma^2) over
            its norm, in [0, 1].
        total: the same over all layers of the adapter together.
        ranks: by layer, what is left.
    """

    max_rank: int
    discarded: Mapping[str, float]
    total: float
    ranks: Mapping[str, int]

    @property
    def lossy(self) -> bool:
        """Whether more than float32 rounding was lost."""
        return self.total > _ROUNDING

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if not self.discarded:
            return (f"max_rank {self.max_rank}: no layer had more ranks; nothing was discarded.",)
        worst = max(self.discarded, key=lambda name: self.discarded[name])
        warning = "warning: " if self.total > _MUCH else ""
        return (
            f"{warning}max_rank {self.max_rank}: re-compressing {len(self.discarded)} layers discards "
            f"{self.total:.3g} of the update's norm in all, at most {self.discarded[worst]:.3g} of one layer's "
            f"({worst}).",
        )


def compress_adapter(folded: FoldedAdapter, max_rank: int) -> tuple[FoldedAdapter, CompressedAdapter]:
    """The best adapter with at most `max_rank` ranks in each layer (Eckart-Young), without a dense matrix.

    Args:
        folded: the adapter; layers of fewer ranks are left as they are.
        max_rank: >= 1.

    Raises:
        ConfigError: max_rank below 1.
    """
    if isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1:
        raise ConfigError(f"max_rank: {max_rank!r} is not possible; give a whole number of at least 1.")
    layers, discarded, lost, whole = {}, {}, 0.0, 0.0
    for name, layer in folded.layers.items():
        lora_A, lora_B = layer.lora_A, layer.lora_B * layer.scaling
        norm = product_norm(lora_A, lora_B) if layer.rank else 0.0
        whole += norm**2
        layers[name] = layer
        if layer.rank > max_rank:
            kept = compress(lora_A, lora_B, max_rank)
            layers[name] = FoldedLayer(layer.shape, kept.lora_A, kept.lora_B, scaling=1.0)
            discarded[name] = kept.discarded
            lost += (kept.discarded * norm) ** 2
    found = replace(folded, layers=layers)
    total = (lost / whole) ** 0.5 if whole > 0 else 0.0
    told = CompressedAdapter(max_rank=max_rank, discarded=discarded, total=total, ranks=found.ranks)
    return replace(found, notes=(*folded.notes, *told.notes)), told
