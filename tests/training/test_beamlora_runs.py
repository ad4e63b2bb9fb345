"""BeamLoRA in a session: what does not fit is refused early, resets are told and missed ones fail, scores go along."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainingArguments

from rankwise.errors import ConfigError, HealthError, PlanError
from rankwise.export.layouts import Layout
from rankwise.export.live import computed_logits
from rankwise.methods.beamlora import BeamLoRA, BeamLoRASchedule, seeded_permutation
from rankwise.training.attach import attach, plan
from rankwise.training.callback import TrainingEvent
from rankwise.training.marker import read_marker
from rankwise.training.session import Session
from rankwise.training.state import resume
from tests.support.models import causal_batch, tiny_llama
from tests.training.jobs import Job, Rows, factors, new_session, trainer_arguments

TARGETS = ["q_proj", "up_proj"]
PRUNING = BeamLoRA(cumsum_threshold=0.7, reset_every=4)
FIRST, OTHER = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def test_a_plan_of_another_scaling_rule_is_refused():
    made = plan(tiny_llama(), "rora", r=4, target_modules=TARGETS)
    with pytest.raises(PlanError, match=r'"alpha/sqrt\(rank\)" \(made by rora\), and beamlora runs with "alpha/r" or'):
        attach(tiny_llama(), PRUNING, plan=made)


def arguments(lr: float = 2e-2) -> Any:
    return SimpleNamespace(learning_rate=lr, lr_scheduler_type="constant")


def session_of(method: BeamLoRA = PRUNING, r: int = 4) -> Session:
    return attach(tiny_llama(), method, r=r, target_modules=TARGETS)


def walk(session: Session, optimizer: Any, first: int, last: int) -> None:
    """Steps of a bare loop."""
    session.model.train()
    for step in range(first, last + 1):
        session.before_step(step)
        session.model(**causal_batch(step)).loss.backward()
        session.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(step)


def trained(method: BeamLoRA = PRUNING, steps: int = 10, **options: Any) -> Session:
    session = session_of(method, **options)
    optimizer, _ = session.optimizers(arguments(), steps)
    session.begin(optimizer, steps)
    walk(session, optimizer, 1, steps)
    session.end(steps)
    return session


def resets(changes: Any) -> list[Mapping[str, Any]]:
    return [line for line in changes if "layer" not in line]


# --- refused before anything happens ----------------------------------------------------------------------------------


def test_rank_one_is_refused_by_plan_and_attach_with_the_model_as_it_was() -> None:
    model = tiny_llama()
    for job in (plan, attach):
        with pytest.raises(ConfigError, match=r"r: 1: beamlora's score of a single rank is always 1.*use r >= 2"):
            job(model, BeamLoRA(), r=1)
    attach(model, "lora", r=1).close()


def test_an_edited_plan_with_uneven_ranks_is_refused_and_one_that_leaves_a_layer_out_is_not() -> None:
    made = plan(tiny_llama(), BeamLoRA(), r=4, target_modules=TARGETS)
    model = tiny_llama()
    message = f"one rank everywhere, and {FIRST} has 4 and {OTHER} 3: give every layer the same rank, or leave it out"
    with pytest.raises(ConfigError, match=message):
        attach(model, BeamLoRA(), plan=made.with_ranks(made.ranks | {OTHER: 3}))
    session = attach(model, BeamLoRA(), plan=made.with_ranks(made.ranks | {OTHER: 0}))
    assert OTHER not in session.layers
    session.close()


@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [
        (BeamLoRA(), 3, "a run of 3 steps has none; train for 4 steps or more"),
        (BeamLoRA(reset_every=6), 10, "a run of 10 steps has none; set beamlora.reset_every to 5 or less"),
        (BeamLoRA(reset_every=4, reset_end_step=2), 10, "reset_end_step: 2: nothing is pruned from there on"),
    ],
)
def test_a_run_without_a_reset_is_refused_with_its_optimizer(method: BeamLoRA, steps: int, message: str) -> None:
    session = session_of(method)
    with pytest.raises(ConfigError, match=message):
        session.optimizers(arguments(), steps)


# --- what a run tells, and what fails it ------------------------------------------------------------------------------


def test_every_reset_is_told_with_what_was_copied_and_the_scores_that_decided() -> None:
    """Ranks do not change, and the lines are there all the same."""
    session = session_of()
    optimizer, _ = session.optimizers(arguments(), 12)
    session.begin(optimizer, 12)
    walk(session, optimizer, 1, 4)
    changes = session.drain_changes()
    (reset,) = resets(changes)
    assert (reset["step"], reset["kind"]) == (4, "reset")
    assert set(reset["figures"]) == {"kept_share", "pruned", "pruned_share", "history_age"}
    lines = [line for line in changes if "layer" in line]
    assert lines
    assert sum(len(line["detail"]["pruned"]) for line in lines) == reset["figures"]["pruned"]
    names = list(session.layers)
    for line in lines:
        assert (line["from"], line["to"]) == (4, 4)
        detail = line["detail"]
        count = len(detail["pruned"])
        order = seeded_permutation(session.seed, 4, names.index(line["layer"]), count)
        assert detail["permutation"] == order.tolist()
        best = sorted(range(4), key=lambda rank, of=detail["importance"]: (-of[rank], rank))[:count]
        assert detail["sources"] == [best[at] for at in order]
        assert sum(detail["importance"]) == pytest.approx(4)
    walk(session, optimizer, 5, 12)
    assert [line["step"] for line in resets(session.drain_changes())] == [8]
    session.end(12)


def test_a_run_whose_resets_were_prevented_fails_with_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BeamLoRASchedule, "_reset", lambda *_: None)
    session = session_of()
    optimizer, _ = session.optimizers(arguments(), 10)
    session.begin(optimizer, 10)
    walk(session, optimizer, 1, 10)
    with pytest.raises(HealthError, match="but no reset was made in 10 steps, and 1 fell due") as caught:
        session.end(10)
    assert caught.value.exit_code == 3
    (check,) = [check for check in session.health.checks if check.id == "schedule"]
    assert check.status == "failed"


def test_a_loop_that_forgets_the_ends_of_steps_fails() -> None:
    session = session_of()
    optimizer, _ = session.optimizers(arguments(), 10)
    session.begin(optimizer, 10)
    for step in range(1, 11):
        session.before_step(step)
        session.model(**causal_batch(step)).loss.backward()
        session.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(HealthError, match="the schedule was called around 0 of 10 optimizer steps"):
        session.end(10)


def test_a_layer_whose_gradient_is_not_finite_sits_the_step_out_with_its_scores() -> None:
    session = session_of()
    schedule: Any = session.schedule
    optimizer, _ = session.optimizers(arguments(), 10)
    session.begin(optimizer, 10)
    walk(session, optimizer, 1, 2)
    before = {name: schedule.gates.value(name).detach().clone() for name in session.layers}
    handle = session.layers[FIRST].lora_B.register_hook(lambda gradient: gradient * float("nan"))
    walk(session, optimizer, 3, 3)
    handle.remove()
    still = [name for name, z in before.items() if torch.equal(schedule.gates.value(name), z)]
    assert still == [FIRST]
    walk(session, optimizer, 4, 10)
    session.end(10)
    assert [line["step"] for line in resets(session.drain_changes())] == [4]
    assert session.health.gradients.skipped()[FIRST] == 1


def test_trainers_own_adamw_moves_the_scores_too(tmp_path: Path) -> None:
    session = session_of()
    events: list[TrainingEvent] = []
    args = TrainingArguments(**trainer_arguments(Job(folder=str(tmp_path), steps=8, save_steps=100)))
    callback = session.callback(on_event=events.append)
    trainer = Trainer(session.model, args, train_dataset=Rows(), callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert session.health.status == "passed"
    assert [line["step"] for event in events for line in resets(event.changes)] == [4]
    assert all(bool((gate != 1).any()) for gate in session.fold_state.gates.values())


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_run_resumed_with_another_length_tells_the_times_that_it_keeps(tmp_path: Path) -> None:
    session = session_of(BeamLoRA())
    optimizer, scheduler = session.optimizers(arguments(), 48)
    session.begin(optimizer, 48)
    walk(session, optimizer, 1, 5)
    session.save(tmp_path / "checkpoint-5", optimizer=optimizer, scheduler=scheduler)
    again = resume(tiny_llama(), tmp_path / "checkpoint-5")
    optimizer, scheduler = again.optimizers(arguments(), 96)
    again.restore(tmp_path / "checkpoint-5", optimizer, scheduler)
    again.begin(optimizer, 96)
    (told,) = [note for note in again.notes if "resets, one after every" in note]
    assert told.startswith("beamlora: 23 resets, one after every 4 steps to step 92; ")
    assert told.endswith("rises from 0.95 to 1 after step 32")


def test_a_checkpoint_between_a_snapshot_and_its_reset_holds_the_past(tmp_path: Path) -> None:
    session = session_of()
    optimizer, scheduler = session.optimizers(arguments(), 12)
    session.begin(optimizer, 12)
    walk(session, optimizer, 1, 3)
    session.save(tmp_path / "checkpoint-3", optimizer=optimizer, scheduler=scheduler)
    recorded = read_marker(tmp_path / "checkpoint-3")["schedule"]
    assert recorded["values"]["snapshot_step"] == 3
    assert f"snapshot.A.{FIRST}" in recorded["tensors"]
    again = resume(tiny_llama(), tmp_path / "checkpoint-3")
    own, scheduler = again.optimizers(arguments(), 12)
    again.restore(tmp_path / "checkpoint-3", own, scheduler)
    again.begin(own, 12)
    for one, moved in ((session, optimizer), (again, own)):
        walk(one, moved, 4, 12)
        one.end(12)
    assert all(torch.equal(value, factors(again)[name]) for name, value in factors(session).items())
    assert again.drain_changes() == session.drain_changes() != ()


def test_the_scores_of_the_best_checkpoint_come_back_with_its_factors(tmp_path: Path) -> None:
    """The largest loss counts as the best, so that an early checkpoint wins."""
    job = Job(folder=str(tmp_path), method="beamlora", steps=8, save_steps=1, keep=None, learning_rate=2e-2)
    session = new_session(job)
    options = {**trainer_arguments(job), "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 1}
    args = TrainingArguments(
        **options, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    trainer = Trainer(
        session.model, args, train_dataset=Rows(), eval_dataset=Rows(4), optimizers=session.optimizers(args, 8),
        callbacks=[session.callback()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    best = int(trainer.state.best_global_step)
    assert best < 3
    found = factors(session)
    for step, equal in ((best, True), (8, False)):
        wanted = factors(resume(tiny_llama(), tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(value, wanted[name]) for name, value in found.items()) is equal
        gates = [name for name in wanted if name.endswith(".gate")]
        assert all(torch.equal(found[name], wanted[name]) for name in gates) is equal
    report = session.export(tmp_path / "adapter", batch={"input_ids": Rows(2).tokens})
    assert report.logit_error is not None
    assert report.logit_error <= 1e-5


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["uniform", "compact", "per_rank"])
def test_m9_stock_peft_computes_the_scored_model_from_a_plain_adapter(tmp_path: Path, layout: Layout) -> None:
    session = trained(steps=10)
    scored = session.fold_state.gates
    assert all(float((gate - 1).abs().max()) > 0.05 for gate in scored.values())
    session.model.eval()
    batch = {key: value for key, value in causal_batch(0).items() if key != "labels"}
    report = session.export(tmp_path / "adapter", layout=layout, batch=batch)
    assert report.logit_error is not None
    assert report.logit_error <= 1e-5
    wanted = computed_logits(session.model, batch)
    base = tiny_llama()
    with torch.no_grad():
        before = base.eval()(**batch).logits
        served = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        logits = served(**batch).logits
    assert float((wanted - before).abs().max()) > 1e-2
    assert float((logits - wanted).abs().max()) <= 1e-5
    assert {served.peft_config["default"].r} == {4}
    assert all(".lora_A." in name or ".lora_B." in name for name in served.state_dict() if "lora" in name)
    session.close()
