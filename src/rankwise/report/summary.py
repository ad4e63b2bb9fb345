"""A rank plan, and how its ranks moved, in few words: what each kind of layer got, the extremes, the events."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from rankwise.ranks.plan import LayerPlan, RankPlan
from rankwise.report.files import RankEvent, Run
from rankwise.report.grid import OUTSIDE, Panel, arrange, headings
from rankwise.report.words import figure

__all__ = ["Share", "events_sentence", "kind_shares", "layers_moved", "live_totals", "places", "rank_sentence"]


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


def events_sentence(run: Run) -> str:
    """How many events a run had, of which kinds, from when to when; how many layers are lower and higher by then."""
    if not run.events:
        return "No event: the ranks are those of the plan throughout."
    kinds = Counter(event.kind or "change" for event in run.events)
    steps = [event.step for event in run.events]
    count = f"{figure(len(run.events))} event{'s' if len(run.events) > 1 else ''}"
    told = ", ".join(f"{figure(number)} {kind}" for kind, number in kinds.items())
    first, last = figure(min(steps)), figure(max(steps))
    when = f"at step {first}" if first == last else f"from step {first} to step {last}"
    start, end = run.start_ranks, run.final_ranks
    fell, rose = (sum(sign * (end[name] - rank) > 0 for name, rank in start.items()) for sign in (-1, 1))
    became = " and ".join(f"{figure(number)} {word}" for number, word in ((fell, "lower"), (rose, "higher")) if number)
    outcome = f"{became} than at the start, of {figure(len(start))} layers" if became else "no layer's rank changed"
    return f"{count} {when}: {told}; {outcome}."


def live_totals(run: Run) -> dict[str, tuple[int, int]]:
    """All live ranks and lora_A and lora_B parameters, at the start and after the last event; empty without a plan."""
    if run.plan is None:
        return {}
    start, end = run.start_ranks, run.final_ranks
    return {
        "live ranks": (sum(start.values()), sum(end.values())),
        "parameters": (run.parameters_of(start), run.parameters_of(end)),
    }


def layers_moved(event: RankEvent) -> str:
    """How many layers an event lowered, raised, and only measured."""
    turns = Counter((line.to > line.from_) - (line.to < line.from_) for line in event.layers)
    words = {-1: "lower", 1: "higher", 0: "at the same rank"}
    return ", ".join(f"{figure(turns[turn])} {word}" for turn, word in words.items() if turns[turn]) or "none"
