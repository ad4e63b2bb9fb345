"""What a run left behind, read from its folder and checked; the formats are those of docs/architecture.md."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from rankwise.errors import ArtifactError, PlanError
from rankwise.ranks.plan import RankPlan

__all__ = ["Health", "HealthLine", "Manifest", "Metric", "RankChange", "RankEvent", "Run", "gathered", "read_run"]

_Json = dict[str, JsonValue]


class _Record(BaseModel):
    """A JSON object whose unknown keys are kept: a later version may write more."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)


class Manifest(_Record):
    """rankwise.json."""

    format: Literal["rankwise-run"]
    version: Literal[1]
    status: Literal["running", "finished", "failed", "interrupted"]
    config: _Json = Field(default_factory=dict)
    config_hash: str | None = None
    versions: dict[str, JsonValue] = Field(default_factory=dict)
    threads: int | None = None
    device: str | None = None
    seed: int | None = None
    data: _Json = Field(default_factory=dict)
    budget: _Json | None = None
    timings: dict[str, float | None] = Field(default_factory=dict)
    result: _Json | None = None
    export: _Json | None = None
    calibration: _Json | None = None
    error: str | None = None


class Metric(_Record):
    """One line of metrics.jsonl; a figure that is not finite is the text "nan" or "inf"."""

    step: int
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    mean_token_accuracy: float | None = None
    eval_mean_token_accuracy: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    seconds: float | None = None

    @property
    def more(self) -> Mapping[str, float]:
        """The figures of other names: what a schedule said of itself."""
        found = {}
        for key, value in (self.model_extra or {}).items():
            try:
                found[key] = float(value)
            except (TypeError, ValueError):
                continue
        return found


class RankChange(_Record):
    """One line of ranks.jsonl: an event as a whole (no layer, figures), or what it did to one layer."""

    step: int
    layer: str = ""
    from_: int = Field(alias="from", default=0)
    to: int = 0
    kind: str = ""
    reason: str = ""
    figures: dict[str, float] = Field(default_factory=dict)
    detail: JsonValue = None

    @property
    def moved(self) -> bool:
        """Whether the layer's rank changed; else it was measured, or a rank became a copy of another."""
        return self.from_ != self.to


@dataclass(frozen=True, slots=True)
class RankEvent:
    """What a schedule did at one step: the event's own line, and a line for each layer that it changed or measured."""

    step: int
    kind: str
    reason: str
    figures: Mapping[str, float]
    layers: tuple[RankChange, ...]

    @property
    def moved(self) -> tuple[RankChange, ...]:
        """The lines of the layers whose rank changed."""
        return tuple(line for line in self.layers if line.moved)


class HealthLine(_Record):
    """One check of health.json."""

    id: str
    stage: Literal["before", "during", "after"]
    status: Literal["passed", "failed", "not exercised", "pending"]
    measured: JsonValue = None
    limit: JsonValue = None
    message: str = ""
    advice: str | None = None


class Health(_Record):
    """health.json."""

    format: Literal["rankwise-health"]
    version: Literal[1]
    status: Literal["passed", "failed", "running"]
    checks: tuple[HealthLine, ...] = ()


@dataclass(frozen=True)
class Run:
    """The files of one run; what an unfinished run has not written yet is empty or None."""

    manifest: Manifest
    plan: RankPlan | None
    metrics: tuple[Metric, ...]
    events: tuple[RankEvent, ...]
    health: Health | None

    @property
    def changes(self) -> tuple[RankChange, ...]:
        """The changes of single layers' ranks, in their order."""
        return tuple(line for event in self.events for line in event.moved)

    @property
    def boosted(self) -> bool:
        """Whether the run trained in rounds whose boosters add up (XGBLoRA): its ranks begin at 0, and may pass r."""
        return any(event.kind == "round" for event in self.events)

    @property
    def start_ranks(self) -> Mapping[str, int]:
        """The rank of every layer before the first event."""
        planned = self.plan.ranks if self.plan else {}
        first: dict[str, int] = {}
        for event in self.events:
            for line in event.layers:
                first.setdefault(line.layer, line.from_)
        return {name: first.get(name, 0 if self.boosted else rank) for name, rank in planned.items()}

    @property
    def final_ranks(self) -> Mapping[str, int]:
        """The rank of every layer after the last event."""
        last = {line.layer: line.to for event in self.events for line in event.layers}
        return {name: last.get(name, rank) for name, rank in self.start_ranks.items()}

    @property
    def parameters(self) -> int:
        """The live lora_A and lora_B parameters after the last event."""
        return self.parameters_of(self.final_ranks)

    def parameters_of(self, ranks: Mapping[str, int]) -> int:
        """The lora_A and lora_B parameters of these ranks, one for every layer of the plan."""
        return sum(ranks[layer.name] * layer.shape.cost for layer in self.plan.layers) if self.plan else 0


def read_run(folder: Path) -> Run:
    """The files of a run.

    A finished run must have its plan, metrics and health checks. A run that is going on, failed or was interrupted may
    lack them, and the last line of its logs may be cut off.

    Args:
        folder: the run's output folder.

    Returns:
        What was read.

    Raises:
        ArtifactError: rankwise.json is missing, a finished run lacks a file, or a file is damaged; it is named.
    """
    path = folder / "rankwise.json"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: {folder} is not the output folder of a rankwise run; name one that is")
    manifest = _parse(Manifest, _text(path), str(path))
    finished = manifest.status == "finished"
    needed = ("plan.json", "metrics.jsonl", "health.json") if finished else ()
    for name in needed:
        if not (folder / name).is_file():
            raise ArtifactError(
                f"{folder / name} is missing although {path} says that the run finished: restore the file, or run "
                "again into an empty folder"
            )
    health = folder / "health.json"
    return Run(
        manifest=manifest,
        plan=_plan(folder / "plan.json"),
        metrics=_lines(Metric, folder / "metrics.jsonl", whole=finished),
        events=gathered(_lines(RankChange, folder / "ranks.jsonl", whole=finished)),
        health=_parse(Health, _text(health), str(health)) if health.is_file() else None,
    )


def gathered(lines: Iterable[RankChange]) -> tuple[RankEvent, ...]:
    """Each event with the layers that follow it.

    Layers that follow no event of their step, kind and reason (the best checkpoint's ranks, taken back) are an event
    of their own.

    Args:
        lines: the lines of ranks.jsonl, in their order.
    """
    found: list[tuple[RankChange, list[RankChange]]] = []
    for line in lines:
        if not line.layer:
            found.append((line, []))
            continue
        about = found[-1][0] if found else None
        if about is None or (about.step, about.kind, about.reason) != (line.step, line.kind, line.reason):
            found.append((line, []))
        found[-1][1].append(line)
    return tuple(
        RankEvent(about.step, about.kind, about.reason, about.figures, tuple(layers)) for about, layers in found
    )


_Kind = TypeVar("_Kind", bound=_Record)


def _parse(kind: type[_Kind], text: str, source: str) -> _Kind:
    """One object of a kind, with every fault in one error."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{source} is damaged: not JSON at line {error.lineno} ({error.msg}); restore it") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}" for fault in error.errors()]
        raise ArtifactError(f"{source} is damaged or not what its name says: {'; '.join(faults)}") from None


def _lines(kind: type[_Kind], path: Path, *, whole: bool) -> tuple[_Kind, ...]:
    """One object a line; a line that a kill cut off may be the last one of a run that has not finished."""
    if not path.is_file():
        return ()
    lines = _text(path).split("\n")
    if not whole and lines[-1] and not _is_json(lines[-1]):
        lines.pop()
    return tuple(_parse(kind, line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _plan(path: Path) -> RankPlan | None:
    if not path.is_file():
        return None
    try:
        return RankPlan.load(path)
    except PlanError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ArtifactError(f"{path} is damaged: not UTF-8 text; restore it") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
