"""The session inside transformers' Trainer: the calls of a bare loop, and checkpoints that are whole or absent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.calibration.processes import all_reduce_sum, process_index, world_size
from rankwise.errors import CheckpointError, ConfigError, TrainingInterrupted
from rankwise.training.engines import situation_of_arguments
from rankwise.training.marker import rotate
from rankwise.training.session import Session
from rankwise.training.signals import StopRequest
from rankwise.training.state import seal_checkpoint

__all__ = ["Listener", "SessionCallback", "TrainingEvent"]

AGREE_EVERY = 8
"""Steps between two looks of several processes at each other's stop requests (each look synchronizes them)."""

EventKind = Literal["begin", "step", "ranks", "log", "evaluate", "save", "end"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEvent:
    """Something that happened in training, for whoever draws or records it; sent in process 0 only.

    Args:
        kind: what happened.
        step: optimizer steps made so far.
        max_steps: optimizer steps of the whole run.
        epoch: epochs made so far.
        values: what Trainer logged (`loss`, `grad_norm`, `learning_rate`, `eval_loss`, ...), and with a loss the
            schedule's figures.
        changes: of a "ranks" event, the lines of `ranks.jsonl`.
        folder: the checkpoint of a "save" event.
    """

    kind: EventKind
    step: int
    max_steps: int
    epoch: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    changes: tuple[Mapping[str, Any], ...] = ()


Listener = Callable[[TrainingEvent], None]


class SessionCallback(TrainerCallback):
    """Runs a session in Trainer: schedules and guard around steps, markers and rotation around checkpoints, signals.

    Trainer's own rotation is switched off (it removes old checkpoints before the new one is complete) and done here
    after the marker is written; `save_total_limit` keeps its meaning. Trainer's filter that hides non-finite losses is
    switched off. Ctrl-C and SIGTERM end the run after a checkpoint at the end of the step, with TrainingInterrupted.

    Args:
        session: the session whose model Trainer trains.
        on_event: listeners.
        stop: signals that the caller already listens to.
    """

    def __init__(
        self, session: Session, *, on_event: Listener | Sequence[Listener] = (), stop: StopRequest | None = None
    ) -> None:
        self.session = session
        self.stop = stop or StopRequest()
        self._listeners: tuple[Listener, ...] = (on_event,) if callable(on_event) else tuple(on_event)
        self._keep: int | None = None
        self._surplus = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What the trainer rounded while it was built is put back before anything is loaded into it."""
        self.session.keep_precision()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wiring and guard; from here on a signal waits for the end of the step."""
        self._check_wiring(args, state, kwargs.get("model"))
        self._tell_of_clipping(args)
        args.logging_nan_inf_filter = False
        if args.save_total_limit is not None:
            self._keep = max(1, args.save_total_limit)
            args.save_total_limit = None
        if args.output_dir and self.session.health.folder is None:
            self.session.health.folder = Path(args.output_dir)
        self.session.begin(kwargs["optimizer"], state.max_steps)
        self.stop.begin_steps()
        self._send("begin", state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the forward pass."""
        # A run killed between its last checkpoint and its end comes back with nothing left to do, yet Trainer
        # (transformers 5.23) makes one more step before it looks: that step is made without effect and not counted.
        self._surplus = state.global_step >= state.max_steps
        if self._surplus:
            self.session.health.gradients.remove()
        else:
            self.session.before_step(state.global_step + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After clipping."""
        if not self._surplus:
            self.session.before_optimizer_step(state.global_step + 1)
            return
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Schedules, then a requested stop: save now, train no further."""
        if self._surplus:
            state.global_step -= 1
            control.should_save = control.should_evaluate = control.should_log = False
            return
        self.session.after_step(state.global_step)
        self._send_changes(state)
        if state.global_step in self.session.checkpoints(state.max_steps):
            control.should_save = True
            evaluates = getattr(args.eval_strategy, "value", args.eval_strategy) != "no"
            control.should_evaluate = control.should_evaluate or evaluates
        if self._stop_agreed(state.global_step):
            control.should_save = True
            control.should_training_stop = True
        self._send("step", state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The guard's look at losses and counters; the schedule's figures go along to the listeners."""
        values = dict(logs or {})
        if "loss" in values:
            values |= self.session.figures()
        self._send("log", state, values=values)
        self.session.logged(state.global_step, values)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Passes the metrics on."""
        self._send("evaluate", state, values=dict(metrics or {}))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer has written its files: add ours, the marker last, and only then let old checkpoints go."""
        run = Path(str(args.output_dir))
        folder = run / f"checkpoint-{state.global_step}"
        seal_checkpoint(self.session, folder)
        if self._keep is not None and process_index() == 0:
            stays = {f"checkpoint-{step}" for step in self.session.checkpoints(state.max_steps)}
            best = {Path(state.best_model_checkpoint).name} if state.best_model_checkpoint else set()
            rotate(run, keep=self._keep, written=folder, protected=stays | best)
        self._send("save", state, folder=folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The guard's last word; an interrupted run ends with TrainingInterrupted instead."""
        self.stop.end_steps()
        if self.stop.requested and state.global_step < state.max_steps:
            self._save_health()
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            raise TrainingInterrupted(
                f"stopped by a signal after step {state.global_step} of {state.max_steps}; {folder.name} is complete: "
                "start the same command again to go on from it"
            )
        self.session.end(state.global_step, best=state.best_model_checkpoint if args.load_best_model_at_end else None)
        self._send_changes(state)
        self._save_health()
        self._send("end", state)

    def close(self) -> None:
        """Puts the signal handlers back that training installed and an exception left behind."""
        self.stop.end_steps()

    def _save_health(self) -> None:
        health = self.session.health
        if health.folder is not None and process_index() == 0:
            health.save(health.folder / "health.json")

    def _check_wiring(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        faults = []
        if model is not None and getattr(model, "module", model) is not self.session.model:
            faults.append(
                f"Trainer trains another model ({type(model).__name__}) than the session's: pass session.model to it"
            )
        if args.save_only_model:
            faults.append(
                "save_only_model leaves the optimizer out of checkpoints, so a run could not go on: set it false"
            )
        if faults:
            raise ConfigError(faults)
        self.session.recipe.check(situation_of_arguments(args))
        if state.global_step != self.session.step:
            raise CheckpointError(
                f"the session is at step {self.session.step} and Trainer starts from step {state.global_step}: call "
                "session = rw.resume(model, checkpoint) and trainer.train(resume_from_checkpoint=checkpoint) with one "
                "checkpoint, or neither"
            )

    def _tell_of_clipping(self, args: TrainingArguments) -> None:
        """Trainer clips the factors' own gradients, which depend on how the update is split between them."""
        method = self.session.recipe.unclipped
        if method is not None and args.max_grad_norm and args.max_grad_norm > 0:
            self.session.remark(
                f"max_grad_norm is {args.max_grad_norm:g}, and {method.id} clips by itself what does not depend on the "
                "factors' scale: set max_grad_norm=0, or the steps depend on how the update is split between them"
            )

    def _stop_agreed(self, step: int) -> bool:
        """Whether to stop here, the same answer in every process."""
        if world_size() == 1:
            return self.stop.requested
        if step % AGREE_EVERY:
            return False
        requested = bool(all_reduce_sum(torch.tensor([float(self.stop.requested)])).item())
        self.stop.requested = requested
        return requested

    def _send_changes(self, state: TrainerState) -> None:
        changes = self.session.drain_changes()
        if changes:
            self._send("ranks", state, changes=changes)

    def _send(
        self,
        kind: EventKind,
        state: TrainerState,
        *,
        values: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        changes: tuple[Mapping[str, Any], ...] = (),
    ) -> None:
        if not self._listeners or process_index():
            return
        event = TrainingEvent(
            kind=kind,
            step=state.global_step,
            max_steps=state.max_steps,
            epoch=float(state.epoch or 0.0),
            values=values or {},
            folder=folder,
            changes=changes,
        )
        for listener in self._listeners:
            listener(event)
