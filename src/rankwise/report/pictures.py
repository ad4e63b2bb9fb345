"""The sections of the report that hold pictures: ranks and their cost, importance, training curves, time."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rankwise.ranks.plan import LayerPlan, RankPlan
from rankwise.report.charts import KIND_COLORS, Line, Picture, importance_bars, line_chart, stacked_bar
from rankwise.report.course import moments
from rankwise.report.files import Metric, Run
from rankwise.report.grid import arrange, headings
from rankwise.report.heat_map import heat_map
from rankwise.report.summary import kind_shares, places, rank_sentence
from rankwise.report.words import duration, figure

__all__ = [
    "Part",
    "curves",
    "importance_section",
    "rank_section",
    "time_section",
]

_BARS = 12
"""Layers in the importance bar chart."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """A key of metrics.jsonl as a line of a chart."""

    name: str
    label: str
    kind: Literal["line", "marks"] = "line"
    color: int = 0


_CURVES: Mapping[str, tuple[_Curve, ...]] = {
    "Loss": (_Curve("loss", "training loss"), _Curve("eval_loss", "evaluation loss", "marks", 1)),
    "Accuracy": (_Curve("eval_accuracy", "evaluation accuracy", "marks", 1),),
    "Token accuracy": (
        _Curve("mean_token_accuracy", "training"),
        _Curve("eval_mean_token_accuracy", "evaluation", "marks", 1),
    ),
    "Learning rate": (_Curve("learning_rate", "learning rate", "line", 2),),
    "Gradient norm": (_Curve("grad_norm", "gradient norm", "line", 3),),
}
"""The charts of a run, in order; one without readings is left out."""


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a stacked bar, with the color it has there."""

    color: int
    label: str
    amount: str
    share: str


def rank_section(run: Run) -> dict[str, object] | None:
    """Which ranks where, and the budget by kind of layer; None before there is a plan."""
    plan = run.plan
    if plan is None:
        return None
    final = run.final_ranks
    values = [final[layer.name] for layer in plan.layers]
    hints = {layer.name: _hint(plan, layer, final[layer.name]) for layer in plan.layers}
    panels = arrange(layer.name for layer in plan.layers)
    # One color scale with the pictures of the ranks before: an end that reads like a start would tell nothing.
    values += [rank for moment in moments(run) for rank in moment.ranks.values()]
    scale = (float(min(values)), float(max(values)))
    maps = [
        Picture(
            heading,
            heat_map(
                f"ranks-{place}", f"Ranks, {panel.stack}", panel, final, scale=scale, text=_rank_text, hints=hints
            ),
        )
        for place, (panel, heading) in enumerate(zip(panels, headings(panels), strict=True))
    ]
    shares = sorted(kind_shares(plan, final), key=lambda share: -share.parameters)
    spent = run.parameters
    pieces = [(share.kind, float(share.parameters)) for share in shares]
    bar = stacked_bar("budget", f"{figure(spent)} of {figure(plan.budget)} parameters used", pieces, plan.budget)
    return {
        "maps": maps,
        "scale": scale,
        "sentence": rank_sentence(plan, final),
        "bar": bar,
        "shares": [
            (min(place, KIND_COLORS - 1), share, share.parameters / max(1, plan.budget))
            for place, share in enumerate(shares)
        ],
        "used": spent,
        "allowed": plan.budget,
        "over": max(0.0, spent / max(1, plan.budget) - 1),
        "rows": [(layer, final[layer.name], plan.scaling(layer.name)) for layer in plan.layers],
        "changed": bool(run.changes),
        "boosted": run.boosted,
        "notes": plan.notes,
    }


def _rank_text(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _hint(plan: RankPlan, layer: LayerPlan, rank: int) -> str:
    parts = [f"rank {rank} of at most {layer.shape.max_rank}", f"{figure(rank * layer.shape.cost)} parameters"]
    if layer.rank:
        parts.append(f"scaling {figure(plan.scaling(layer.name))}")
    if layer.importance is not None:
        parts.append(f"importance {figure(layer.importance)}")
    return f"{layer.name}: {', '.join(parts)}" + (f" ({layer.reason})" if layer.reason else "")


def importance_section(run: Run) -> dict[str, object] | None:
    """Importances as multiples of their mean, so that figures are comparable between runs."""
    found = {
        layer.name: layer.importance
        for layer in (run.plan.layers if run.plan else ())
        if layer.importance is not None and math.isfinite(layer.importance)
    }
    mean = sum(found.values()) / len(found) if found else 0.0
    if mean <= 0:
        return None
    relative = {name: value / mean for name, value in found.items()}
    panels = arrange(found)
    scale = (min(relative.values()), max(relative.values()))
    hints = {
        name: f"{name}: importance {figure(found[name])}, {figure(value, 3)} times the mean"
        for name, value in relative.items()
    }
    maps = [
        Picture(
            heading,
            heat_map(
                f"importance-{place}",
                f"Importance, {panel.stack}",
                panel,
                relative,
                scale=scale,
                text=_times_text,
                hints=hints,
            ),
        )
        for place, (panel, heading) in enumerate(zip(panels, headings(panels), strict=True))
    ]
    leaders = sorted(found, key=lambda name: -found[name])[:_BARS]
    ranks, labels = run.final_ranks, places(panels)
    bars = importance_bars(
        "leaders", "The most important layers", [(labels[name], found[name], ranks[name]) for name in leaders]
    )
    return {"maps": maps, "scale": scale, "bars": bars, "shown": len(leaders), "layers": len(found)}


def _times_text(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def curves(metrics: Iterable[Metric]) -> list[Picture]:
    """One chart a question; a step that was trained again after a resume counts with its last reading."""
    readings: dict[str, dict[float, float]] = defaultdict(dict)
    for metric in metrics:
        for name in {line.name for lines in _CURVES.values() for line in lines}:
            value = getattr(metric, name)
            if value is not None:
                readings[name][float(metric.step)] = value
    pictures: list[Picture] = []
    for title, curve in _CURVES.items():
        lines = [
            Line(each.label, sorted(readings[each.name].items()), each.kind, each.color)
            for each in curve
            if each.name in readings
        ]
        if lines:
            pictures.append(Picture(title, line_chart(f"curve-{len(pictures)}", title, lines)))
    return pictures


def time_section(timings: Mapping[str, float | None]) -> dict[str, object] | None:
    """How long each phase took; None if no phase has ended."""
    known = [(phase.replace("_", " "), value) for phase, value in timings.items() if value]
    total = sum(value for _, value in known)
    if not known:
        return None
    parts = [
        Part(min(place, KIND_COLORS - 1), phase, duration(value), f"{value / total:.1%}")
        for place, (phase, value) in enumerate(known)
    ]
    return {
        "bar": stacked_bar("timings", f"{duration(total)} in all", known, total),
        "parts": parts,
        "total": duration(total),
    }
