"""The session inside Trainer: order of events, checkpoints, rotation, signals, wiring."""

import json
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from rankwise.errors import CheckpointError, ConfigError, HealthError, TrainingInterrupted
from rankwise.methods.schedule import SteadyRanks
from rankwise.training.callback import TrainingEvent
from rankwise.training.marker import checkpoint_step, complete_checkpoints, last_complete_checkpoint
from rankwise.training.session import Session
from rankwise.training.signals import StopRequest
from rankwise.training.state import resume
from tests.support.models import tiny_llama
from tests.training.jobs import LOOPS, Job, Rows, factors, final, new_session, run, trainer_arguments


class Recorder(SteadyRanks):
    """A schedule that writes down its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.session: Session | None = None

    def begin(self, optimizer: torch.optim.Optimizer, max_steps: int) -> None:
        assert type(optimizer) is torch.optim.AdamW
        self.calls.append(("begin", max_steps))

    def before_step(self, step: int) -> None:
        self.calls.append(("before_step", step))

    def before_optimizer_step(self, step: int) -> None:
        assert self.session is not None
        assert all(layer.lora_B.grad is not None for layer in self.session.layers.values())
        self.calls.append(("before_optimizer_step", step))

    def after_step(self, step: int) -> None:
        self.calls.append(("after_step", step))

    def end(self, step: int) -> None:
        self.calls.append(("end", step))

    def figures(self) -> dict[str, float]:
        return {"recorder_calls": float(len(self.calls))}

    def remarks(self) -> tuple[str, ...]:
        return ()

    def fault(self) -> None: ...

    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def scheduled(recorder: Recorder) -> Session:
    made = new_session(Job(folder=""))
    recorder.session = Session(made.model, made.plan, made.recipe, 0, settings=made.settings, schedule=recorder)
    return recorder.session


def trainer_for(job: Job, session: Session, *more: TrainerCallback, callback: bool = True, **options: Any) -> Trainer:
    args = TrainingArguments(**{**trainer_arguments(job), **options})
    callbacks = [session.callback(), *more] if callback else [*more]
    made = Trainer(
        session.model,
        args,
        train_dataset=Rows(),
        optimizers=session.optimizers(args, args.max_steps),
        callbacks=callbacks,
    )
    made.remove_callback(PrinterCallback)
    return made


class At(TrainerCallback):
    """Does something at the end of a step, before the session's callback acts on it."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action()


def test_a_schedule_is_called_around_each_optimizer_step_whatever_the_accumulation(tmp_path: Path):
    recorder = Recorder()
    session = scheduled(recorder)
    trainer_for(Job(folder=str(tmp_path), steps=3), session).train()
    expected: list[tuple[Any, ...]] = [("begin", 3)]
    for step in (1, 2, 3):
        expected += [("before_step", step), ("before_optimizer_step", step), ("after_step", step)]
    assert recorder.calls == [*expected, ("end", 3)]
    fired = next(check for check in session.health.checks if check.id == "schedule")
    assert (fired.status, fired.measured, fired.limit) == ("passed", 3, 3)


def test_a_schedules_figures_go_along_with_each_logged_loss(tmp_path: Path):
    recorder = Recorder()
    session = scheduled(recorder)
    events: list[TrainingEvent] = []
    made = trainer_for(Job(folder=str(tmp_path), steps=2), session, callback=False, logging_steps=1)
    made.add_callback(session.callback(on_event=events.append))
    made.train()
    logged = [event.values for event in events if event.kind == "log"]
    assert [values.get("recorder_calls") for values in logged] == [4.0, 7.0, None]
    assert all("loss" in values for values in logged[:2])


def test_a_schedule_that_the_loop_forgot_fails_loudly():
    recorder = Recorder()
    session = scheduled(recorder)
    optimizer, _ = session.optimizers(TrainingArguments(output_dir="unused", use_cpu=True, report_to=[]), 2)
    session.begin(optimizer, 2)
    session.model(input_ids=Rows().tokens[:2], labels=Rows().tokens[:2]).loss.backward()
    optimizer.step()
    with pytest.raises(HealthError, match="the schedule was called around 0 of 1 optimizer steps"):
        session.end(1)


def test_events_tell_the_run_in_order(tmp_path: Path):
    events: list[TrainingEvent] = []
    session = new_session(Job(folder=""))
    made = trainer_for(Job(folder=str(tmp_path), steps=3, save_steps=2), session, callback=False)
    made.add_callback(session.callback(on_event=events.append))
    made.train()
    kinds = [(event.kind, event.step) for event in events]
    assert kinds[:4] == [("begin", 0), ("step", 1), ("step", 2), ("save", 2)]
    assert kinds[4:6] == [("step", 3), ("log", 3)]
    assert kinds[-1] == ("end", 3)
    assert {event.max_steps for event in events} == {3}
    assert {"loss", "grad_norm", "learning_rate"} <= set(events[5].values)
    assert events[3].folder == tmp_path / "checkpoint-2"


def test_rotation_keeps_the_limit_and_trainer_does_not_rotate_itself(tmp_path: Path):
    session = new_session(Job(folder=""))
    made = trainer_for(Job(folder=str(tmp_path), steps=5, save_steps=1, keep=2), session)
    made.train()
    assert made.args.save_total_limit is None
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [4, 5]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_without_a_limit_every_checkpoint_stays(tmp_path: Path):
    session = new_session(Job(folder=""))
    trainer_for(Job(folder=str(tmp_path), steps=3, save_steps=1, keep=None), session).train()
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [1, 2, 3]


@cache
def undisturbed() -> dict[str, torch.Tensor]:
    folder = mkdtemp(prefix="undisturbed-")
    run(Job(folder=folder, steps=5, save_steps=100))
    return final(Path(folder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_goes_on_bit_equal(tmp_path: Path, number: int):
    split = Job(folder=str(tmp_path), steps=5, save_steps=100)
    before = signal.getsignal(number)
    session = new_session(split)
    made = trainer_for(split, session, At(3, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(TrainingInterrupted, match="after step 3 of 5; checkpoint-3 is complete"):
        made.train()
    assert signal.getsignal(number) is before
    assert last_complete_checkpoint(split.folder) == Path(split.folder) / "checkpoint-3"
    assert json.loads((Path(split.folder) / "health.json").read_text())["status"] == "running"
    run(split)
    ours, wanted = final(tmp_path), undisturbed()
    assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []


def test_a_second_signal_aborts_at_once_without_a_checkpoint(tmp_path: Path):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    job = Job(folder=str(tmp_path), steps=5, save_steps=100)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(job, new_session(job), At(2, twice)).train()
    assert last_complete_checkpoint(tmp_path) is None


def test_a_signal_before_training_saves_nothing(tmp_path: Path):
    job = Job(folder=str(tmp_path), steps=5)
    session = new_session(job)
    made = trainer_for(job, session, callback=False)
    with StopRequest() as stop:
        made.add_callback(session.callback(stop=stop))
        with pytest.raises(TrainingInterrupted, match="nothing was saved"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_signal_in_the_last_step_ends_the_run_as_usual(tmp_path: Path):
    job = Job(folder=str(tmp_path), steps=3, save_steps=100)
    session = new_session(job)
    trainer_for(job, session, At(3, lambda: os.kill(os.getpid(), signal.SIGINT))).train()
    assert session.health.status == "passed"


def test_trainers_filter_that_hides_broken_losses_is_off(tmp_path: Path):
    job = Job(folder=str(tmp_path), steps=3)
    session = new_session(job)

    def poison() -> None:
        next(reversed(session.layers.values())).base.module.weight.data[0, 0] = float("nan")

    made = trainer_for(job, session, At(1, poison), logging_steps=1)
    with pytest.raises(HealthError, match="'loss' failed"):
        made.train()
    assert made.args.logging_nan_inf_filter is False
    assert json.loads((tmp_path / "health.json").read_text())["status"] == "failed"
    session.close()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_bad_gradient_costs_one_pair_one_step_and_the_run_goes_on(tmp_path: Path, accumulation: int):
    job = Job(folder=str(tmp_path), steps=3)
    session = new_session(job)
    name, layer = next(iter(session.layers.items()))
    calls: list[int] = []

    def once(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("inf") if len(calls) == 2 else gradient

    layer.lora_B.register_hook(once)
    trainer_for(job, session, gradient_accumulation_steps=accumulation).train()
    assert session.health.gradients.skipped() == {n: int(n == name) for n in session.layers}
    assert session.health.status == "passed"


def test_another_model_than_the_sessions_is_refused(tmp_path: Path):
    job = Job(folder=str(tmp_path))
    session, other = new_session(job), new_session(job)
    made = trainer_for(job, session, callback=False)
    made.add_callback(other.callback())
    with pytest.raises(ConfigError, match=r"pass session\.model"):
        made.train()


def test_the_trainers_own_optimizer_in_place_of_the_recipes_is_refused(tmp_path: Path):
    job = Job(folder=str(tmp_path), method="lora-rite", steps=2)
    session = new_session(job)
    args = TrainingArguments(**trainer_arguments(job))
    made = Trainer(session.model, args, train_dataset=Rows(), callbacks=[session.callback()])
    made.remove_callback(PrinterCallback)
    with pytest.raises(ConfigError, match=r"the recipe's optimizer is lora-rite, but the trainer runs AdamW"):
        made.train()
    assert session.step == 0


def test_a_trainer_that_clips_where_the_method_must_not_be_clipped_is_told_once(tmp_path: Path):
    job = Job(folder=str(tmp_path), method="lora-rite", steps=1, save_steps=100)
    session = new_session(job)
    told: list[str] = []
    session.on_remark = told.append
    trainer_for(job, session, max_grad_norm=0.5, warmup_steps=0).train()
    assert len(told) == 1
    assert "max_grad_norm is 0.5, and lora-rite clips by itself" in told[0]
    assert told[0] in session.notes
    session = new_session(job)
    with pytest.warns(UserWarning, match=r"max_grad_norm is 1, and lora-rite .*: set max_grad_norm=0"):
        trainer_for(job, session, max_grad_norm=1.0, warmup_steps=0).train()
    session = new_session(job)
    trainer_for(job, session, warmup_steps=0).train()  # max_grad_norm is 0: nothing to say
    assert session.notes == ()


def test_checkpoints_without_an_optimizer_are_refused(tmp_path: Path):
    job = Job(folder=str(tmp_path))
    with pytest.raises(ConfigError, match="save_only_model"):
        trainer_for(job, new_session(job), save_only_model=True).train()


def test_a_checkpoint_given_to_trainer_alone_is_refused(tmp_path: Path):
    job = Job(folder=str(tmp_path), steps=2)
    run(job)
    with pytest.raises(CheckpointError, match=r"rw\.resume"):
        trainer_for(job, new_session(job)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_checkpoint_survives_rotation(tmp_path: Path):
    job = Job(folder=str(tmp_path), steps=4, save_steps=1, keep=1)
    session = new_session(job)
    options = {**trainer_arguments(job), "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 1}
    args = TrainingArguments(
        **options, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    made = Trainer(
        session.model, args, train_dataset=Rows(), eval_dataset=Rows(4), optimizers=session.optimizers(args, 4),
        callbacks=[session.callback()],
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    made.train()
    steps = [checkpoint_step(path) for path in complete_checkpoints(tmp_path)]
    assert steps == sorted({int(made.state.best_global_step), 4})
    assert int(made.state.best_global_step) < 4


def test_a_resumed_session_has_the_factors_of_the_checkpoint(tmp_path: Path):
    run(Job(folder=str(tmp_path), steps=2))
    session = resume(tiny_llama(), tmp_path / "checkpoint-2")
    stored = final(tmp_path)
    assert all(torch.equal(value, stored[name]) for name, value in factors(session).items())


def test_an_adapter_that_sfttrainer_rounded_on_a_quantized_base_trains_and_resumes_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # TRL rounds where the base says that it is quantized; this base only says so, and Trainer must not hear of it.
    monkeypatch.setattr(Trainer, "__init__", _not_quantized(Trainer.__init__))
    folder = str(tmp_path)
    session = new_session(Job(folder=folder, loop="sft", dropout=0.0))
    start = factors(session)
    session.model.is_loaded_in_4bit = True
    job = Job(folder=folder, loop="sft", dropout=0.0, steps=2, save_steps=1, keep=None)
    rounded = []
    keep = session.keep_precision
    monkeypatch.setattr(session, "keep_precision", lambda: (rounded.append(_dtypes(session)), keep()))
    begin = session.begin
    seen = {}
    monkeypatch.setattr(session, "begin", lambda *x: (begin(*x), seen.update(factors(session))))
    LOOPS["sft"](job, session, None)
    assert {torch.bfloat16} in rounded
    assert all(torch.equal(seen[name], start[name]) for name in start)
    assert _dtypes(session) == {torch.float32}
    assert [note for note in session.notes if "had been rounded to bfloat16 after attach" in note]
    again = resume(tiny_llama(), tmp_path / "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(factors(again).values(), factors(session).values(), strict=True))


def _dtypes(session: Session) -> set[torch.dtype]:
    return {layer.lora_A.dtype for layer in session.layers.values()}


def _not_quantized(built: Any) -> Any:
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if hasattr(model, "is_loaded_in_4bit"):
            del model.is_loaded_in_4bit
        built(self, *args, **kwargs)

    return build
