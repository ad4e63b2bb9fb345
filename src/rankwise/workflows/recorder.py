"""What training tells: drawn by the listener, kept in metrics.jsonl and ranks.jsonl."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.workflows.events import Listener, Metrics, Note, PhaseDone, PhaseProgress, PhaseStarted
from rankwise.workflows.run_folder import write_atomically

if TYPE_CHECKING:
    from rankwise.training.callback import TrainingEvent

__all__ = ["Recorder"]

METRICS = "metrics.jsonl"
CHANGES = "ranks.jsonl"
_SHOWN = {
    "live_ranks": "live ranks",
    "live_parameters": "parameters",
    "density": "density",
    "kept_share": "kept share of the scores",
    "booster_norm": "norm of the booster",
}
"""Of an event's figures those that a note tells; all are in ranks.jsonl."""
_KEPT = ("loss", "learning_rate", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens")


class Recorder:
    """Turns training events into the workflow's events and lines of metrics.jsonl and ranks.jsonl.

    Args:
        folder: the run's output folder.
        listener: told of everything.
        step: the step that a continued run starts from; later lines of the file are cut off.
        writes: False in all processes but the first, which are sent no events either.
        schedule: the id of the method that acts around steps; figures that begin with it are kept.
    """

    def __init__(
        self, folder: Path, listener: Listener, *, step: int = 0, writes: bool = True, schedule: str | None = None
    ) -> None:
        self._own = f"{schedule}_" if schedule else None
        self._path, self._changes = folder / METRICS, folder / CHANGES
        self._listener = listener
        self._detail = ""
        self._continued = step > 0
        self._begun = time.monotonic()
        self._spent = 0.0
        self.figures: dict[str, float] = {}
        """The last value of each figure that training or evaluation gave."""
        self.evaluated_at: int | None = None
        """The step of the last evaluation on the validation rows."""
        if writes:
            self._keep_until(step)

    @property
    def seconds(self) -> float:
        """Training time so far, that of earlier parts of the run included."""
        return self._spent + time.monotonic() - self._begun

    def __call__(self, event: "TrainingEvent") -> None:
        """Receives one training event."""
        if event.kind == "begin":
            self._begun = time.monotonic()
            self._listener(
                PhaseStarted(phase="training", title="Training", total=event.max_steps, unit="step", done=event.step)
            )
        elif event.kind == "step":
            self._listener(PhaseProgress(phase="training", done=event.step, total=event.max_steps, detail=self._detail))
        elif event.kind == "ranks":
            self._ranks_changed(event)
        elif event.kind == "log":
            self._logged(event)
        elif event.kind == "end":
            self._listener(PhaseDone(phase="training", seconds=self.seconds, detail=self._detail))

    def cut(self, step: int, trained: Mapping[str, int], exported: Mapping[str, int]) -> None:
        """Notes the layers that the final adapter holds with other ranks than were trained.

        Args:
            step: the last one.
            trained: by layer, the ranks that the schedule left.
            exported: those in the file.
        """
        about = {"step": step, "kind": "export", "reason": "the export keeps to the budget", "final": True}
        sums = {"ranks": sum(trained.values()), "exported": sum(exported.values())}
        moved = {name: rank for name, rank in trained.items() if exported[name] != rank}
        lines = [{**about, "layer": name, "from": rank, "to": exported[name]} for name, rank in moved.items()]
        self._write([{**about, "figures": sums}, *lines])

    def _write(self, changes: Sequence[Mapping[str, Any]]) -> None:
        with self._changes.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(_finite(dict(change))) + "\n" for change in changes)

    def _ranks_changed(self, event: "TrainingEvent") -> None:
        self._write(event.changes)
        for change in event.changes:
            if "layer" not in change:
                shown = {name: value for name, value in change["figures"].items() if name in _SHOWN}
                told = ", ".join(f"{_SHOWN[name]} {_figure(value)}" for name, value in shown.items())
                self._listener(Note(text=f"step {change['step']}: {change['reason']}" + (f" ({told})" if told else "")))

    def _logged(self, event: "TrainingEvent") -> None:
        values = {key: float(value) for key, value in event.values.items() if isinstance(value, int | float)}
        if "train_runtime" in values:  # the summary at the end, of the part of the run that this process made
            found = values["train_loss"] if not self._continued else self._mean_loss()
            self.figures |= {} if found is None else {"train_loss": found}
            return
        kept = {key: value for key, value in values.items() if self._keeps(key)}
        if not kept:
            return
        self.figures |= kept
        if "eval_loss" in kept:
            self.evaluated_at = event.step
        if "loss" in kept:
            self._detail = f"loss {kept['loss']:.4g}"
        line: dict[str, Any] = {"step": event.step, "epoch": round(event.epoch, 6), **kept}
        line["seconds"] = round(self.seconds, 3)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_finite(line)) + "\n")
        self._listener(Metrics(values=line))

    def _mean_loss(self) -> float | None:
        """The mean of the logged losses of all parts of a run, each over the steps since the last; None of none."""
        total, last = 0.0, 0
        for line in self._path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if "loss" in values:
                total, last = total + float(values["loss"]) * (values["step"] - last), values["step"]
        return total / last if last else None

    def _keeps(self, key: str) -> bool:
        own = self._own is not None and key.startswith(self._own)
        return own or key in _KEPT or _is_evaluation(key)

    def _keep_until(self, step: int) -> None:
        """Cuts off what a killed run wrote after the checkpoint that goes on."""
        lines = []
        text = self._path.read_text(encoding="utf-8") if step and self._path.is_file() else ""
        for line in text.splitlines():
            try:
                values = json.loads(line)
            except ValueError:  # the last line of a killed run
                continue
            if values["step"] <= step:
                lines.append(line)
                self._spent = float(values.get("seconds", 0.0))
                self.figures |= {key: value for key, value in values.items() if self._keeps(key)}
                if "eval_loss" in values:
                    self.evaluated_at = int(values["step"])
        write_atomically(self._path, "".join(f"{line}\n" for line in lines))
        text = self._changes.read_text(encoding="utf-8") if step and self._changes.is_file() else ""
        write_atomically(self._changes, "".join(f"{line}\n" for line in text.splitlines() if _made_by(line, step)))


def _made_by(line: str, step: int) -> bool:
    """Whether a line is whole and of training up to this step; what came after the last step comes again."""
    try:
        values = json.loads(line)
        return bool(values["step"] <= step) and not values.get("final")
    except ValueError:  # the last line of a killed run
        return False


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _is_evaluation(key: str) -> bool:
    part, _, name = key.partition("_")
    return part in ("eval", "test") and not name.endswith(("runtime", "per_second", "model_preparation_time"))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: such figures become text, which readers turn back."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
