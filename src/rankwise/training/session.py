"""One adapter in training: the model, its plan, and everything that must happen around its steps."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rankwise.adapters.attach import AdaptedLayer, adapted_layers
from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.adapters.offset import LiveOffset
from rankwise.adapters.state import FoldState
from rankwise.calibration.processes import broadcast_object, process_index, world_size
from rankwise.calibration.statistics import GradientStatistics
from rankwise.errors import ConfigError, VerificationError
from rankwise.methods.base import Method
from rankwise.methods.recipe import Recipe, Situation
from rankwise.methods.schedule import Schedule
from rankwise.ranks.plan import RankPlan
from rankwise.training.engines import situation_of_arguments, situation_of_optimizer
from rankwise.training.guard import Guard, HealthCheck
from rankwise.training.optimizers import (
    adamw_and_scheduler,
    adamw_settings_unused,
    optimizer_kind,
    own_and_scheduler,
    refuse_large_state,
    state_in_words,
    unwrapped,
)
from rankwise.training.precision import KeptPrecision
from rankwise.training.sample import Sample
from rankwise.training.scaler import take_out_scale

if TYPE_CHECKING:
    from peft import PeftModel

    from rankwise.export.layouts import Layout
    from rankwise.export.write import ExportReport
    from rankwise.training.callback import Listener, SessionCallback
    from rankwise.training.signals import StopRequest

__all__ = ["AdapterSettings", "CalibrationSummary", "Session"]

_AROUND_STEPS = ("before_step", "before_optimizer_step", "after_step")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What belongs to the adapter and is neither in the plan nor in a method."""

    lora_dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    adapter_name: str = "default"

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of `attach_lora`."""
        return {**asdict(self), "modules_to_save": list(self.modules_to_save) or None}


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSummary:
    """What is worth keeping of the gradient statistics once the start is written; JSON-ready."""

    batches: int
    skipped: int
    tokens: float
    loss: float
    memory: str
    collector: str
    row_share: float
    seconds: float
    from_cache: bool
    unreached: tuple[str, ...] = ()

    @classmethod
    def of(cls, statistics: GradientStatistics) -> Self:
        """The figures without the tensors, and the layers that no batch reached (allowed by `on_unused="min"`)."""
        figures = {n: getattr(statistics, n) for n in cls.__dataclass_fields__ if n != "unreached"}
        return cls(**figures, unreached=tuple(name for name, one in statistics.layers.items() if not one.batches))


class Session:
    """A model with its adapter, in training: what `attach` and `resume` hand back.

    Works unchanged in transformers' Trainer, TRL's SFTTrainer and a bare Accelerate loop. A bare loop calls `begin`,
    `before_step`, `before_optimizer_step`, `after_step`, `logged` and `end`; for the trainers the callback does.

    Args:
        model: the attached model, a stock PeftModel.
        plan: the ranks and scalings that the adapter has.
        recipe: the methods behind it.
        seed: the run's seed.
        settings: dropout, saved modules, task type.
        offset: the start that is subtracted again, in place; the session takes it off in `close`.
        schedule: what acts around steps; the session closes it.
        calibration: figures of the gradient statistics, if any were taken.
        step: optimizer steps already made (a resumed run).
        notes: remarks worth showing.
        base_weights: the fingerprint of the base weights, if it is known; it must be where a method writes them.
        told_ranks: by layer, the ranks that the events of a resumed run have told of so far.
    """

    def __init__(
        self,
        model: "PeftModel",
        plan: RankPlan,
        recipe: Recipe,
        seed: int,
        *,
        settings: AdapterSettings | None = None,
        offset: LiveOffset | None = None,
        schedule: Schedule | None = None,
        calibration: CalibrationSummary | None = None,
        step: int = 0,
        notes: Sequence[str] = (),
        base_weights: str | None = None,
        told_ranks: Mapping[str, int] | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.recipe = recipe
        self.seed = seed
        self.settings = settings or AdapterSettings()
        self.offset = offset
        self.schedule = schedule
        self.calibration = calibration
        self.step = step
        self.notes = (*notes, *(() if offset is None else offset.notes))
        self.on_remark: Callable[[str], None] = _warn
        """What is told of something that only shows once training is set up; by default a Python warning."""
        self.layers: Mapping[str, AdaptedLayer] = adapted_layers(model, self.settings.adapter_name)
        self.health = Guard(
            self.layers,
            model,
            calibrated=calibration.batches if calibration else 0,
            unreached=calibration.unreached if calibration else (),
            beside=lambda: self.fold_state,
        )
        self._precision = KeptPrecision(model)
        self._sample = Sample(model)
        self._planned_steps: int | None = None
        self._called: dict[str, tuple[int, int]] = {}
        self._steps_before = 0
        self._changes: list[dict[str, Any]] = []
        live = schedule.live_ranks() if schedule is not None else {}
        self._ranks = dict(told_ranks or live or plan.ranks)
        self._base_weights = base_weights
        self._scaler: Any = None
        self._optimizer: Optimizer | None = None
        self._random_states: Mapping[str, Any] | None = None
        self._callbacks: list[SessionCallback] = []

    @property
    def base_weights(self) -> str:
        """The fingerprint of the base weights as they were found; hashed once."""
        if self._base_weights is None:
            self._base_weights = weights_fingerprint(self.model)
        return self._base_weights

    @property
    def fold_state(self) -> FoldState:
        """What export has to fold beside lora_A and lora_B; empty for most methods."""
        state = FoldState() if self.schedule is None else self.schedule.fold_state()
        return state if self.offset is None else replace(state, offsets=self.offset.pairs)

    @property
    def told_ranks(self) -> dict[str, int]:
        """By layer, the ranks as the schedule's events have told them so far."""
        return dict(self._ranks)

    @property
    def export_budget(self) -> int | None:
        """The most lora_A and lora_B parameters of an export, where the schedule trains more; None for all."""
        return None if self.recipe.schedule is None else self.recipe.schedule.export_budget(self.plan.budget)

    def optimizers(self, args: object, num_training_steps: int) -> tuple[Optimizer, LRScheduler]:
        """The run's optimizer and its learning-rate schedule, as `Trainer(optimizers=...)` takes them.

        It is AdamW, or the recipe's own over the pairs of factors with whatever else is trained beside them.

        Args:
            args: TrainingArguments or any object with `learning_rate` and the like; see `adamw_and_scheduler` and
                `own_and_scheduler`.
            num_training_steps: optimizer steps of the whole run.

        Raises:
            ConfigError: a learning rate of 0, no steps, an optimizer that is not AdamW, AdamW settings that nothing
                would follow, a state that does not fit in memory, a schedule that does not fit the run.
            RecipeError: FSDP or an engine under which the recipe cannot train.
        """
        self.keep_precision()
        self.recipe.check(situation_of_arguments(args))
        if self.schedule is not None:
            self.schedule.outlook(num_training_steps)  # refuses a run that it does not fit before anything is written
        method = self.recipe.optimize
        if method is None:
            built = adamw_and_scheduler(self.model, args, num_training_steps, self.schedule)
        else:
            state = refuse_large_state(method, self.layers)
            built = own_and_scheduler(self.model, self.layers, args, num_training_steps, method)
            self._tell_of_own_optimizer(method, args, built[0], state)
        decays = str(getattr(args, "lr_scheduler_type", "linear")).rpartition(".")[2].lower()
        self._planned_steps = None if decays.startswith("constant") else num_training_steps
        return built

    def _tell_of_own_optimizer(self, method: Method, args: object, optimizer: Optimizer, state: int | None) -> None:
        """What of the arguments the pairs do not follow, and what the state will take."""
        unused = adamw_settings_unused(args, method)
        plain = any(group.get("kind") != "lora_pair" for group in optimizer.param_groups)
        if unused and not plain:
            raise ConfigError([f"{fault}: set that, and leave this at Trainer's default" for fault in unused])
        for text in unused:
            self.remark(f"{text}; it holds for modules_to_save alone")
        if state is not None:
            self.notes = (*self.notes, state_in_words(method, state))

    def remark(self, text: str) -> None:
        """Notes something and tells `on_remark` of it, once."""
        if text not in self.notes:
            self.notes = (*self.notes, text)
            self.on_remark(text)

    def callback(
        self, *, on_event: "Listener | Sequence[Listener]" = (), stop: "StopRequest | None" = None
    ) -> "SessionCallback":
        """The Trainer callback: schedules, guard, complete checkpoints, rotation and signals.

        Args:
            on_event: called with each `TrainingEvent`.
            stop: signals that the caller already listens to; by default the callback listens while it trains.
        """
        from rankwise.training.callback import SessionCallback

        made = SessionCallback(self, on_event=on_event, stop=stop)
        self._callbacks.append(made)
        return made

    def keep_precision(self) -> None:
        """Puts factors back that a trainer rounded after attach, with a note; `optimizers` and `begin` do it too.

        The callback calls it before Trainer loads an optimizer's state, which takes its precision from the parameters.

        Raises:
            ConfigError: FSDP shards what was rounded.
        """
        done = self._precision.put_back()
        if done is not None:
            self.notes = (*self.notes, done)

    def begin(self, optimizer: Any, max_steps: int) -> None:
        """Before the first step: refusals, the guard's checks, then the schedule; the optimizer may be wrapped.

        Raises:
            ConfigError: the optimizer, its learning rate or the schedule does not fit the run.
            RecipeError: an engine under which the recipe cannot train.
        """
        self.keep_precision()
        self._precision.forget()
        self.recipe.check(situation_of_optimizer(optimizer))
        self._refuse_sharded_base()
        inner = unwrapped(optimizer)
        self._refuse_other_optimizer(inner)
        self._scaler, self._optimizer = getattr(optimizer, "scaler", None), inner
        self.health.gradients.protecting = self._scaler is None
        self.health.begin(inner, max_steps, self._planned_steps)
        self._sample.listen()
        self._called, self._steps_before = {}, self.health.gradients.steps
        if self.schedule is not None:
            self.schedule.begin(inner, max_steps)
            told = dict.fromkeys((*self.schedule.outlook(max_steps), *self.schedule.remarks()))
            self.notes = (*self.notes, *(text for text in told if text not in self.notes))

    def _refuse_sharded_base(self) -> None:
        """A base weight that a method writes and that was sharded since attach could not be given back."""
        if self.recipe.writes_base is not None and any(
            isinstance(layer.base.module.weight, DTensor) for layer in self.layers.values()
        ):
            self.recipe.check(Situation(fsdp=True))

    def take_back(self, folder: str | os.PathLike[str]) -> None:
        """Brings gates and boosters back to a checkpoint whose factors the trainer loaded (`load_best_model_at_end`).

        Raises:
            CheckpointError: the checkpoint has no state of this schedule.
        """
        if self.schedule is not None and self.schedule.fold_state():
            from rankwise.training.state import schedule_state

            self.schedule.load_state_dict(schedule_state(Path(folder)))
            reason = f"{Path(folder).name} is the best, and its factors were loaded"
            for name, rank in self.schedule.live_ranks().items():
                if rank != self._ranks.get(name, 0):
                    about = {"step": self.step, "kind": "best", "reason": reason}
                    self._changes.append({**about, "layer": name, "from": self._ranks.get(name, 0), "to": rank})
                    self._ranks[name] = rank

    def _refuse_other_optimizer(self, inner: Optimizer) -> None:
        """A recipe that names an optimizer may not run under another one: the result would carry its name only."""
        method = self.recipe.optimize
        if method is None:
            return
        wanted = optimizer_kind(method)
        if not isinstance(inner, wanted):
            raise ConfigError(
                f"the recipe's optimizer is {method.id}, but the trainer runs {type(inner).__name__}: pass it "
                f"optimizers=session.optimizers(args, num_training_steps), or a {wanted.__name__} over session.model"
            )

    def before_step(self, step: int) -> None:
        """Before the forward pass of step `step`, counted from 1."""
        if self._random_states is not None:
            from rankwise.training.state import set_random_states

            set_random_states(self._random_states)
            self._random_states = None
        self._count("before_step", step)
        if self.schedule is not None:
            self.schedule.before_step(step)

    def before_optimizer_step(self, step: int) -> None:
        """After clipping, before the optimizer; a schedule is not asked in a step that every pair sits out."""
        self._count("before_optimizer_step", step)
        if self.schedule is not None:
            take_out_scale(self._scaler, self._optimizer)
            if not self.layers.keys() <= self.health.gradients.withhold():
                self.schedule.before_optimizer_step(step)

    def after_step(self, step: int) -> None:
        """After the optimizer, before logging, evaluation and saving.

        Raises:
            HealthError: after the first step at a learning rate above 0, if no gradient reached a layer.
        """
        if self.schedule is not None:
            self.schedule.after_step(step)
            self._note_events()
        self.step = step
        self._count("after_step", step)
        self.health.stepped()

    def _note_events(self) -> None:
        """What the schedule changed, for whoever asks with `drain_changes`."""
        assert self.schedule is not None
        for event in self.schedule.events():
            about = {"step": event.step, "kind": event.kind, "reason": event.reason}
            figures = {name: int(v) if float(v).is_integer() else v for name, v in event.figures.items()}
            self._changes.append({**about, "figures": figures})
            for name in dict.fromkeys((*event.ranks, *event.layers)):
                rank = event.ranks.get(name, self._ranks.get(name, 0))
                line = {**about, "layer": name, "from": self._ranks.get(name, 0), "to": rank}
                detail = event.layers.get(name)
                self._changes.append(line if detail is None else {**line, "detail": detail})
                self._ranks[name] = rank

    def drain_changes(self) -> tuple[dict[str, Any], ...]:
        """The schedule's events since this was last asked, as `ranks.jsonl` holds them.

        An event is a line with `step`, `kind`, `reason` and `figures`, then one for each layer that it changed or
        measured, with `layer`, `from`, `to` and perhaps `detail`; `final` where it came after the last step.
        """
        found, self._changes = tuple(self._changes), []
        return found

    def checkpoints(self, max_steps: int) -> tuple[int, ...]:
        """Steps after which the schedule wants a checkpoint that stays, whatever the trainer's settings."""
        return () if self.schedule is None else self.schedule.checkpoints(max_steps)

    def _count(self, call: str, step: int) -> None:
        """Steps around which a call was made; micro-batches may repeat it."""
        count, last = self._called.get(call, (0, -1))
        self._called[call] = (count + (step != last), step)

    def figures(self) -> dict[str, float]:
        """What the schedule has to say of the last step; waits for the device, so ask at logging steps."""
        return {} if self.schedule is None else self.schedule.figures()

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """At a logging step: the guard looks at `loss` and `grad_norm` and at its counters.

        Raises:
            HealthError: training is broken.
        """
        self.health.logged(step, values)

    def end(self, step: int, *, best: str | os.PathLike[str] | None = None) -> None:
        """After the last step: the schedule finishes, then the guard proves that something was trained.

        Args:
            step: optimizer steps made.
            best: the checkpoint whose factors the trainer loaded in place of the last ones, if it did: what stands
                beside them is taken back too, before the schedule finishes with what the model then holds.

        Raises:
            HealthError: it was not.
            CheckpointError: `best` has no state of this schedule.
        """
        if self.schedule is not None:
            self._check_schedule()
            before = len(self._changes)
            if best is not None:
                self.take_back(best)
            self.schedule.end(step)
            self._note_events()
            self._changes[before:] = [{**change, "final": True} for change in self._changes[before:]]
            if not any((self.schedule.live_ranks() or self.plan.ranks).values()):
                self.remark("every gate became zero: the adapter that is exported equals the base model")
        self.health.end(step)

    def _check_schedule(self) -> None:
        """A schedule that nobody called, or that reached no layer, has silently left the run as it was."""
        assert self.schedule is not None
        made = self.health.gradients.steps - self._steps_before  # a loss scaler may skip steps
        calls = {name: self._called.get(name, (0, -1))[0] for name in _AROUND_STEPS}
        missed = [name for name, count in calls.items() if count < made]
        message = f"the schedule was called around {min(calls.values())} of {made} optimizer steps"
        advice = ""
        if missed:
            told = " and ".join(missed)
            advice = f"pass session.callback() to the trainer, or call {told} in every step, with the step's number"
        elif fault := self.schedule.fault():
            message, advice = f"{message}, but {fault.message}", fault.advice
        self.health.settle(
            HealthCheck(
                id="schedule",
                stage="during",
                status="failed" if advice else "passed",
                measured=min(calls.values()),
                limit=made,
                message=message,
                advice=advice,
            )
        )

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        step: int | None = None,
        optimizer: Any = None,
        scheduler: Any = None,
    ) -> None:
        """Writes a complete native checkpoint that `resume` goes on from.

        Under Trainer the callback does this. In a bare loop give the optimizer and scheduler: they are stored, with the
        random states, for `restore`.

        Args:
            folder: the checkpoint's folder, normally `checkpoint-<step>`.
            step: optimizer steps made; by default as counted by `after_step`.
            optimizer: the optimizer, wrapped or not.
            scheduler: the learning-rate scheduler, wrapped or not.
        """
        from rankwise.training.state import write_checkpoint

        self.step = self.step if step is None else step
        write_checkpoint(self, Path(folder), optimizer=optimizer, scheduler=scheduler)

    def restore(self, folder: str | os.PathLike[str], optimizer: Any, scheduler: Any = None) -> int:
        """Loads what `save` stored beside the adapter: the second half of resuming a bare loop.

        Optimizer and scheduler are loaded now, the random states at the next `before_step`: the loop passes over the
        batches behind it first. Give the DataLoader a generator of its own, so that starting it moves no global state.

        Returns:
            The optimizer steps made.

        Raises:
            CheckpointError: the checkpoint holds none.
        """
        from rankwise.training.state import read_training_state

        self._random_states = read_training_state(self, Path(folder), optimizer, scheduler)
        return self.step

    def export(self, folder: str | Path, *, layout: "Layout" = "uniform", **options: Any) -> "ExportReport":
        """Writes the plain adapter, verified against the live model; see `export.write.export_adapter` for the options.

        Without `batch=`, logits are compared on the first row that the session was trained on; before training there is
        none, and the report says that logits were not compared. With several processes every one calls this; process 0
        writes, and all get its report or its error. Of a model that FSDP2 shards, each process writes its own copy of
        what it gathers: give each its own folder.

        Raises:
            VerificationError: the written adapter does not equal the trained model; the health check `export` then
                failed.
            ExportError: the layout cannot hold this adapter.
        """
        check = HealthCheck(
            id="export", stage="after", status="passed", message="the exported adapter equals the model"
        )
        options.setdefault("batch", self._sample.batch)
        try:
            report = self._exported(folder, layout, options)
        except VerificationError as error:
            advice = "keep the checkpoint and report this: the written adapter would serve something else"
            self.health.record(replace(check, status="failed", message=str(error), advice=advice))
            raise
        lost = report.compression
        if lost is not None and lost.lossy:
            loss = f"re-compressed to rank {lost.max_rank}, which discards {lost.total:.3g} of the update"
            check = replace(check, message=f"the exported adapter equals the model {loss}")
        if report.logit_error is None:
            reason = "give batch= for that" if options["batch"] is None else "see the notes of the export"
            check = replace(check, message=f"{check.message}; logits were not compared ({reason})")
            if options["batch"] is None:
                report = replace(report, notes=(*report.notes, "logits were not compared: there was no batch."))
        error_found = None if report.verification is None else report.verification.update_error
        self.health.record(replace(check, measured=error_found))
        return report

    def _exported(self, folder: str | Path, layout: "Layout", options: Mapping[str, Any]) -> "ExportReport":
        """Process 0's report or error, in every process."""
        from rankwise.export.write import export_adapter

        def write() -> "ExportReport":
            kept = {"state": self.fold_state, "offset": self.offset, "plan": self.plan, "budget": self.export_budget}
            return export_adapter(self.model, folder, layout=layout, **{**kept, **options})

        sharded = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        if world_size() == 1 or sharded:  # gathering what is sharded takes every process
            return write()
        report: ExportReport | None = None
        fault: Exception | None = None
        if process_index() == 0:
            try:
                report = write()
            except Exception as error:  # noqa: BLE001  the others wait for the verdict, whatever it is
                fault = error
        report, fault = broadcast_object((report, fault))
        if fault is not None:
            raise fault
        assert report is not None
        return report

    def close(self) -> None:
        """Undoes what rankwise put in place: hooks, signal handlers, the schedule, the offset; the adapter stays.

        After it the base weights are as they were found, and an adapter whose start was subtracted (LoRA-GA) computes
        its whole update: export before.
        """
        with ExitStack() as stack:  # all of it, whatever goes wrong with one part
            for callback in self._callbacks:
                stack.callback(callback.close)
            if self.offset is not None:
                stack.callback(self.offset.close)
            if self.schedule is not None:
                stack.callback(self.schedule.close)
            stack.callback(self._sample.close)
            stack.callback(self.health.gradients.remove)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
