"""What the report says about a run, as plain values for the page's template; no markup but the charts'."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from markupsafe import Markup
from pydantic import JsonValue

from rankwise.ranks.plan import LayerPlan, RankPlan
from rankwise.report.charts import KIND_COLORS, Line, importance_bars, line_chart, stacked_bar
from rankwise.report.files import Manifest, Metric, Run
from rankwise.report.grid import OUTSIDE, Panel, arrange
from rankwise.report.heat_map import heat_map
from rankwise.report.svg import duration, figure

__all__ = ["Card", "Part", "Picture", "Share", "facts", "kind_shares", "page", "plain"]

_BARS = 12
_STATUS = {
    "finished": ("✓", "good", "The run finished."),
    "running": ("…", "open", "The run is going on, or was killed before it could say otherwise."),
    "interrupted": ("‖", "open", "The run was interrupted; the same command again continues it."),
    "failed": ("✕", "bad", "The run failed."),
}


@dataclass(frozen=True, slots=True)
class Card:
    """One large figure at the head of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart with its caption."""

    caption: str
    chart: Markup


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a stacked bar, with the color it has there."""

    color: int
    label: str
    amount: str
    share: str


@dataclass(frozen=True, slots=True)
class Share:
    """What one kind of layer got: how many layers, which ranks, how many parameters."""

    kind: str
    layers: int
    lowest: int
    mean: float
    highest: int
    parameters: int


def page(run: Run) -> dict[str, object]:
    """Every value that the template shows.

    Args:
        run: the files of a run.

    Returns:
        The template's variables; a section that has nothing to show is None or empty.
    """
    manifest = run.manifest
    symbol, tone, sentence = _STATUS[manifest.status]
    return {
        "model": _model_name(run),
        "methods": _methods(run),
        "status": {"word": manifest.status, "symbol": symbol, "tone": tone, "sentence": sentence},
        "cards": _cards(run),
        "problems": [check for check in run.health.checks if check.status == "failed"] if run.health else [],
        "error": manifest.error,
        "ranks": _ranks(run),
        "importance": _importance(run),
        "curves": _curves(run.metrics),
        "health": run.health,
        "changes": run.changes,
        "export": _export(manifest),
        "result": facts(manifest.result or {}),
        "calibration": facts(manifest.calibration or {}),
        "timings": _timings(manifest.timings),
        "data": {name: facts(part if isinstance(part, dict) else {"": part}) for name, part in manifest.data.items()},
        "config": manifest.config,
        "setting": _setting(manifest, run.plan),
    }


def facts(values: Mapping[str, JsonValue], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (name, text) lines: names in words, numbers as people read them."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        name = " · ".join(filter(None, (prefix, key.replace("_", " "))))
        if isinstance(value, dict):
            lines += facts(value, name)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for number, item in enumerate(value, 1):
                lines += facts(item if isinstance(item, dict) else {"": item}, f"{name} {number}")
        else:
            lines.append((name, plain(value, key)))
    return lines


def plain(value: JsonValue, key: str = "") -> str:
    """One value as people read it; the key's name says whether a number is a share or a time."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int() | float() if _is_share(key) and 0 <= value <= 1:
            return f"{value:.2%}"
        case int() | float() if key.endswith("seconds"):
            return duration(value)
        case int() | float():
            return figure(value)
        case list():
            return ", ".join(plain(item, key) for item in value) or "none"
        case _:
            return str(value)


def _is_share(key: str) -> bool:
    return "accuracy" in key or key.endswith(("share", "fraction"))


def _model_name(run: Run) -> str:
    named = run.manifest.config.get("model") or (run.plan.model.name if run.plan else "")
    return PurePosixPath(str(named)).name or "a model"


def _methods(run: Run) -> list[str]:
    named = run.manifest.config.get("method")
    if isinstance(named, list):
        return [str(method) for method in named]
    return [named] if isinstance(named, str) else list(run.plan.methods if run.plan else ("lora",))


def _cards(run: Run) -> list[Card]:
    """The figures of the result, then budget, time and the proof of the export."""
    result = run.manifest.result or {}
    numbers = {
        key: value for key, value in result.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    majority = numbers.pop("majority_share", None)
    cards = []
    for key, value in list(numbers.items())[:4]:
        note = f"majority class {majority:.2%}" if majority is not None and "accuracy" in key else ""
        cards.append(Card(key.replace("_", " "), plain(value, key), note))
    if run.plan:
        used, allowed = _used(run, run.plan), run.plan.budget
        cards.append(Card("parameters", figure(used), f"{used / allowed:.1%} of {figure(allowed)} (r = {run.plan.r})"))
    seconds = sum(value for value in run.manifest.timings.values() if value)
    if seconds:
        cards.append(Card("time", duration(seconds), f"{len(run.manifest.timings)} phases"))
    error = (run.manifest.export or {}).get("update_error")
    if isinstance(error, int | float):
        cards.append(Card("export error", figure(error, 2), "largest relative, read back from the file"))
    return cards


def _used(run: Run, plan: RankPlan) -> int:
    final = run.final_ranks
    return sum(final[layer.name] * layer.shape.cost for layer in plan.layers)


def kind_shares(plan: RankPlan, ranks: Mapping[str, int]) -> list[Share]:
    """What each kind of layer got, in the order of the model.

    Args:
        plan: the layers.
        ranks: rank by full layer name, normally `plan.ranks`.
    """
    panels = arrange(layer.name for layer in plan.layers)
    layers = {layer.name: layer for layer in plan.layers}
    groups: dict[str, list[LayerPlan]] = defaultdict(list)
    for panel in panels:
        for (_, kind), name in panel.cells.items():
            groups[kind if len(panels) == 1 else f"{panel.stack} · {kind}"].append(layers[name])
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


def _ranks(run: Run) -> dict[str, object] | None:
    plan = run.plan
    if plan is None:
        return None
    final = run.final_ranks
    values = [final[layer.name] for layer in plan.layers]
    hints = {layer.name: _hint(plan, layer, final[layer.name]) for layer in plan.layers}
    panels = arrange(layer.name for layer in plan.layers)
    scale = (float(min(values)), float(max(values)))
    maps = [
        Picture(
            _caption(panel, panels),
            heat_map(
                f"ranks-{place}", f"Ranks, {panel.stack}", panel, final, scale=scale, text=_rank_text, hints=hints
            ),
        )
        for place, panel in enumerate(panels)
    ]
    shares = sorted(kind_shares(plan, final), key=lambda share: -share.parameters)
    used = _used(run, plan)
    pieces = [(share.kind, float(share.parameters)) for share in shares]
    bar = stacked_bar("budget", f"{figure(used)} of {figure(plan.budget)} parameters used", pieces, plan.budget)
    return {
        "maps": maps,
        "scale": scale,
        "sentence": _rank_sentence(plan, final),
        "bar": bar,
        "shares": [
            (min(place, KIND_COLORS - 1), share, share.parameters / max(1, plan.budget))
            for place, share in enumerate(shares)
        ],
        "used": used,
        "allowed": plan.budget,
        "rows": [(layer, final[layer.name], plan.scaling(layer.name)) for layer in plan.layers],
        "changed": bool(run.changes),
        "notes": plan.notes,
    }


def _caption(panel: Panel, panels: tuple[Panel, ...]) -> str:
    return panel.stack if len(panels) > 1 or panel.stack == OUTSIDE else ""


def _rank_text(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _hint(plan: RankPlan, layer: LayerPlan, rank: int) -> str:
    parts = [f"rank {rank} of at most {layer.shape.max_rank}", f"{figure(rank * layer.shape.cost)} parameters"]
    if layer.rank:
        parts.append(f"scaling {figure(plan.scaling(layer.name))}")
    if layer.importance is not None:
        parts.append(f"importance {figure(layer.importance)}")
    return f"{layer.name}: {', '.join(parts)}" + (f" ({layer.reason})" if layer.reason else "")


def _rank_sentence(plan: RankPlan, ranks: Mapping[str, int]) -> str:
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


def _importance(run: Run) -> dict[str, object] | None:
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
            _caption(panel, panels),
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
        for place, panel in enumerate(panels)
    ]
    leaders = sorted(found, key=lambda name: -found[name])[:_BARS]
    ranks = run.final_ranks
    bars = importance_bars(
        "leaders", "The most important layers", [(name, found[name], ranks[name]) for name in leaders]
    )
    return {"maps": maps, "scale": scale, "bars": bars, "shown": len(leaders), "layers": len(found)}


def _times_text(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _curves(metrics: Iterable[Metric]) -> list[Picture]:
    """One chart a question; a step that was trained again after a resume counts with its last reading."""
    readings: dict[str, dict[float, float]] = defaultdict(dict)
    for metric in metrics:
        for name in ("loss", "eval_loss", "eval_accuracy", "learning_rate", "grad_norm"):
            value = getattr(metric, name)
            if value is not None:
                readings[name][float(metric.step)] = value
    charts = (
        (
            "Loss",
            (
                Line("training loss", _points(readings, "loss")),
                Line("evaluation loss", _points(readings, "eval_loss"), "marks", 1),
            ),
        ),
        ("Evaluation accuracy", (Line("accuracy", _points(readings, "eval_accuracy"), "marks", 1),)),
        ("Learning rate", (Line("learning rate", _points(readings, "learning_rate"), color=2),)),
        ("Gradient norm", (Line("gradient norm", _points(readings, "grad_norm"), color=3),)),
    )
    pictures: list[Picture] = []
    for title, lines in charts:
        shown = [line for line in lines if line.points]
        if shown:
            pictures.append(Picture(title, line_chart(f"curve-{len(pictures)}", title, shown)))
    return pictures


def _points(readings: Mapping[str, Mapping[float, float]], name: str) -> list[tuple[float, float]]:
    return sorted(readings.get(name, {}).items())


def _export(manifest: Manifest) -> dict[str, object] | None:
    if not manifest.export:
        return None
    verdicts = manifest.export.get("verdicts")
    rows = [row for row in verdicts if isinstance(row, dict)] if isinstance(verdicts, list) else []
    rest = {key: value for key, value in manifest.export.items() if key != "verdicts"}
    columns = ("consumer", "version", "status", "error", "reason")
    return {"verdicts": [{column: row.get(column) for column in columns} for row in rows], "facts": facts(rest)}


def _timings(timings: Mapping[str, float | None]) -> dict[str, object] | None:
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


def _setting(manifest: Manifest, plan: RankPlan | None) -> list[tuple[str, str]]:
    """What someone needs to run it again and get the same bits."""
    lines = [("seed", str(manifest.seed)), ("threads", str(manifest.threads))]
    if manifest.config_hash:
        lines.append(("config hash", manifest.config_hash))
    if plan:
        lines += [("plan hash", plan.hash()), ("model fingerprint", plan.model.fingerprint or "–")]
        lines += [("scaling rule", str(plan.scaling_rule.value)), ("lora_alpha", figure(plan.lora_alpha))]
    return lines + [(name, str(version)) for name, version in manifest.versions.items()]
