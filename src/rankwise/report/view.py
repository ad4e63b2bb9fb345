"""What the report says about a run, as plain values for the page's template; no markup but the charts'."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from rankwise.ranks.plan import RankPlan
from rankwise.report.course import course_gallery, driving_curves
from rankwise.report.files import Manifest, RankChange, RankEvent, Run
from rankwise.report.pictures import curves, importance_section, rank_section, time_section
from rankwise.report.reasons import reason_galleries, told
from rankwise.report.summary import events_sentence, layers_moved, live_totals
from rankwise.report.words import duration, facts, figure, plain, with_verification

__all__ = ["Card", "page"]

_RESULT_CARDS = 3
_MEASURED_SHOWN = 1000
"""Lines of layers that kept their rank, in a page; ranks.jsonl has them all."""
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
        "ranks": rank_section(run),
        "importance": importance_section(run),
        "curves": curves(run.metrics),
        "health": run.health,
        "course": _course(run),
        "export": _export(manifest),
        "result": facts(manifest.result or {}),
        "calibration": facts(manifest.calibration or {}),
        "timings": time_section(manifest.timings),
        "data": {name: facts(part if isinstance(part, dict) else {"": part}) for name, part in manifest.data.items()},
        "config": manifest.config,
        "setting": _setting(manifest, run.plan),
    }


def _course(run: Run) -> dict[str, object] | None:
    """The schedule's events, the ranks that they moved, and what moved them; None without events."""
    if not run.events:
        return None
    measured = [line for event in run.events for line in event.layers if not line.moved]
    return {
        "sentence": events_sentence(run),
        "totals": live_totals(run),
        "end": "end" if run.manifest.status == "finished" else "so far",
        "ranks": course_gallery(run),
        "curves": driving_curves(run),
        "reasons": reason_galleries(run),
        "events": [_event_row(event) for event in run.events],
        "changes": [_change_row(line) for line in run.changes],
        "measured": [_change_row(line) for line in measured[:_MEASURED_SHOWN]],
        "measured_in_all": len(measured),
    }


def _event_row(event: RankEvent) -> dict[str, object]:
    # A name stays with its number where the line breaks.
    figures = [f"{name} {text}".replace(" ", "\N{NO-BREAK SPACE}") for name, text in facts(event.figures)]
    about = {"step": event.step, "kind": event.kind, "reason": event.reason}
    return about | {"layers": layers_moved(event), "figures": ", ".join(figures)}


def _change_row(line: RankChange) -> tuple[RankChange, str]:
    return line, told(line)


def _model_name(run: Run) -> str:
    named = run.manifest.config.get("model") or (run.plan.model.name if run.plan else "")
    return "/".join(PurePosixPath(str(named)).parts[-2:]) or "a model"


def _methods(run: Run) -> list[str]:
    named = run.manifest.config.get("method")
    if isinstance(named, list):
        return [str(method) for method in named]
    return [named] if isinstance(named, str) else list(run.plan.methods if run.plan else ("lora",))


def _cards(run: Run) -> list[Card]:
    """The figures of the result, then budget, time and the proof of the export."""
    result = run.manifest.result or {}
    telling = sorted((key for key, value in result.items() if _is_figure(key, value)), key=_telling)
    cards = []
    for key in telling[:_RESULT_CARDS]:
        majority = result.get(key.replace("accuracy", "majority_share"), result.get("majority_share"))
        note = f"majority class {plain(majority, 'share')}" if "accuracy" in key and majority is not None else ""
        cards.append(Card(key.replace("_", " "), plain(result[key], key), note))
    if run.plan:
        spent, allowed = run.parameters, run.plan.budget
        note = f"{spent / allowed:.1%} of {figure(allowed)} (r\N{NO-BREAK SPACE}{run.plan.r})"
        if run.changes:
            start, end = live_totals(run)["live ranks"]
            note += f"; {figure(end)} live ranks, {figure(start)} at the start"
        cards.append(Card("parameters", figure(spent), note))
    seconds = sum(value for value in run.manifest.timings.values() if value)
    if seconds:
        cards.append(Card("time", duration(seconds), f"{len(run.manifest.timings)} phases"))
    error = with_verification(run.manifest.export or {}).get("update_error")
    if isinstance(error, int | float):
        cards.append(Card("export error", figure(error, 2), "largest relative, read back from the file"))
    return cards


def _is_figure(key: str, value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not key.endswith("majority_share")


def _telling(key: str) -> tuple[bool, bool, bool]:
    """Accuracies before losses, those before counts; test before validation before training."""
    return ("accuracy" not in key, "loss" not in key, not key.startswith(("test", "eval")))


def _export(manifest: Manifest) -> dict[str, object] | None:
    if not manifest.export:
        return None
    export = with_verification(manifest.export)
    verdicts = export.pop("verdicts", None)
    rows = [row for row in verdicts if isinstance(row, dict)] if isinstance(verdicts, list) else []
    columns = ("consumer", "version", "evidence", "status", "error", "reason")
    return {"verdicts": [{column: row.get(column) for column in columns} for row in rows], "facts": facts(export)}


def _setting(manifest: Manifest, plan: RankPlan | None) -> list[tuple[str, str]]:
    """What someone needs to run it again and get the same bits."""
    lines = [("seed", str(manifest.seed)), ("threads", str(manifest.threads))]
    if manifest.config_hash:
        lines.append(("config hash", manifest.config_hash))
    if plan:
        lines += [("plan hash", plan.hash()), ("model fingerprint", plan.model.fingerprint or "–")]
        lines += [("scaling rule", str(plan.scaling_rule.value)), ("lora_alpha", figure(plan.lora_alpha))]
    lines += [("device", manifest.device)] if manifest.device else []
    return lines + [(name, str(version)) for name, version in manifest.versions.items()]
