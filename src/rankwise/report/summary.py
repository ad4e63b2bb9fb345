"""A rank plan in few words: what each kind of layer got, and the extremes."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from rankwise.ranks.plan import LayerPlan, RankPlan
from rankwise.report.grid import OUTSIDE, Panel, arrange, headings

__all__ = ["Share", "kind_shares", "places", "rank_sentence"]


@dataclass(frozen=True, slots=True)
class Share:
    """What one kind of layer got: how many layers, which ranks, how many parameters."""

    kind: str
    layers: int
    lowest: int
    mean: float
    highest: int
    parameters: int


def kind_shares(plan: RankPlan, ranks: Mapping[str, int]) -> list[Share]:
    """What each kind of layer got, in the order of the model.

    Args:
        plan: the layers.
        ranks: rank by full layer name, normally `plan.ranks`.
    """
    panels = arrange(layer.name for layer in plan.layers)
    layers = {layer.name: layer for layer in plan.layers}
    groups: dict[str, list[LayerPlan]] = defaultdict(list)
    for panel, heading in zip(panels, headings(panels), strict=True):
        prefix = f"{heading} · " if heading and heading != OUTSIDE else ""
        for (_, kind), name in panel.cells.items():
            groups[prefix + kind].append(layers[name])
    return [
        Share(
            kind=kind,
            layers=len(members),
            lowest=min(ranks[layer.name] for layer in members),
            mean=sum(ranks[layer.name] for layer in members) / len(members),
            highest=max(ranks[layer.name] for layer in members),
            parameters=sum(ranks[layer.name] * layer.shape.cost for layer in members),
        )
        for kind, members in groups.items()
    ]


def rank_sentence(plan: RankPlan, ranks: Mapping[str, int]) -> str:
    """The number of layers, the range and mean of their ranks, and the two ends by name."""
    ordered = sorted(plan.layers, key=lambda layer: ranks[layer.name])
    least, most = ordered[0], ordered[-1]
    lowest, highest = ranks[least.name], ranks[most.name]
    count = f"{len(ordered)} adapted layer{'s' if len(ordered) > 1 else ''}"
    if lowest == highest:
        return f"{count}, all of rank {lowest}."
    mean = sum(ranks[layer.name] for layer in ordered) / len(ordered)
    return (
        f"{count} with ranks from {lowest} to {highest}, {mean:.1f} on average. "
        f"Most: {most.name} ({highest}). Least: {least.name} ({lowest})."
    )


def places(panels: tuple[Panel, ...]) -> dict[str, str]:
    """Each layer as a reader finds it in the heat map: kind and block, the stack where there are several."""
    return {
        name: kind if row is None else f"{kind}, {heading or 'block'} {row}"
        for panel, heading in zip(panels, headings(panels), strict=True)
        for (row, kind), name in panel.cells.items()
    }
