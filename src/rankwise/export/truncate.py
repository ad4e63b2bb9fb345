"""An adapter whose ranks grew in training, cut to a parameter budget over all layers; what that loses is told."""

from dataclasses import replace

import torch

from rankwise.export.compress import CompressedAdapter
from rankwise.export.fold import FoldedAdapter, FoldedLayer
from rankwise.linalg.factors import compress
from rankwise.ranks.truncation import truncated_ranks

__all__ = ["truncate_adapter"]

_MUCH = 0.05


def truncate_adapter(folded: FoldedAdapter, budget: int) -> tuple[FoldedAdapter, CompressedAdapter | None]:
    """The adapter with at most `budget` parameters in lora_A and lora_B, without a dense matrix.

    Args:
        folded: the adapter; returned as it is where it fits the budget.
        budget: the most parameters of all layers together, normally the plan's: those of a uniform rank r.

    Returns:
        The adapter, each layer of which keeps its largest singular values (`ranks.truncation.truncated_ranks`), and
        what was discarded: None where nothing had to be.

    Raises:
        BudgetError: a budget below 0.
    """
    spent = sum(layer.rank * layer.shape.cost for layer in folded.layers.values())
    if spent <= budget:
        return folded, None
    shapes = [layer.shape for layer in folded.layers.values()]
    whole = {
        name: compress(layer.lora_A, layer.lora_B * layer.scaling, max(layer.rank, 1))
        for name, layer in folded.layers.items()
    }
    # Each column of a compressed lora_B has the root of its singular value for a norm.
    values = {name: sorted(w.lora_B.double().square().sum(dim=0).tolist(), reverse=True) for name, w in whole.items()}
    ranks = truncated_ranks(values, shapes, budget)
    layers, discarded = {}, {}
    for name, layer in folded.layers.items():
        kept = ranks[name]
        layers[name] = FoldedLayer(layer.shape, whole[name].lora_A[:kept], whole[name].lora_B[:, :kept], scaling=1.0)
        if kept < len(values[name]):
            discarded[name] = _share(values[name][kept:], values[name])
    everything = [value for found in values.values() for value in found]
    lost = [value for name, found in values.items() for value in found[ranks[name] :]]
    total = _share(lost, everything)
    told = CompressedAdapter(max_rank=max(ranks.values()), discarded=discarded, total=total, ranks=ranks)
    note = (
        f"{'warning: ' if total > _MUCH else ''}max_rank auto: {spent} parameters were trained and the budget is "
        f"{budget}: {sum(len(found) for found in values.values())} ranks became {sum(ranks.values())}, which discards "
        f"{total:.3g} of the update's norm in all, at most {max(discarded.values(), default=0.0):.3g} of one layer's."
    )
    return replace(folded, layers=layers, notes=(*folded.notes, note)), told


def _share(lost: list[float], whole: list[float]) -> float:
    """The norm of what is lost over the norm of the whole; 0 where there is nothing to lose."""
    norms = [float(torch.linalg.vector_norm(torch.tensor(part, dtype=torch.float64))) for part in (lost, whole)]
    return norms[0] / norms[1] if norms[1] > 0 else 0.0
