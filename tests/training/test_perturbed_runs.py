"""GGPO and MGPO in a session: a run in which nothing was perturbed fails; pairs that sit a step out teach nothing."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from rankwise.errors import CheckpointError, HealthError
from rankwise.methods.ggpo import GGPO, MGPO
from rankwise.methods.lora_rite import LoRARITE
from rankwise.ranks.plan import RankPlan
from rankwise.training.attach import attach, plan
from rankwise.training.session import Session
from tests.support.models import causal_batch, tiny_llama

ARGS = SimpleNamespace(learning_rate=1e-2, lr_scheduler_type="constant")
BOTH = pytest.mark.parametrize("method", [GGPO(), MGPO()], ids=["ggpo", "mgpo"])
FIRST = "model.layers.0.self_attn.q_proj"


def session_of(method: Any, *, training: bool = True) -> Session:
    session = attach(tiny_llama(), method, r=2, target_modules=["q_proj", "up_proj"])
    session.model.train(training)
    return session


def run(
    session: Session, optimizer: Any, steps: range, *, calls: str = "before optimizer after", renumber: bool = False
) -> None:
    """Steps of a bare loop that makes only the calls that are named."""
    for step in steps:
        number = 1 if renumber else step
        if "before" in calls:
            session.before_step(number)
        session.model(**causal_batch(step)).loss.backward()
        if "optimizer" in calls:
            session.before_optimizer_step(number)
        optimizer.step()
        optimizer.zero_grad()
        if "after" in calls:
            session.after_step(number)


def begun(session: Session, steps: int = 6) -> Any:
    optimizer = session.optimizers(ARGS, steps)[0]
    session.begin(optimizer, steps)
    return optimizer


def schedule_check(session: Session) -> Any:
    return next(check for check in session.health.checks if check.id == "schedule")


# --- was anything perturbed? --------------------------------------------------------------------------------------


@BOTH
def test_a_loop_that_makes_every_call_passes(method: Any) -> None:
    session = session_of(method)
    run(session, begun(session), range(1, 4))
    assert session.figures()
    session.end(3)
    assert schedule_check(session).status == "passed"
    session.close()


@BOTH
@pytest.mark.parametrize(
    ("calls", "named"),
    [("optimizer after", "before_step"), ("before after", "before_optimizer_step"), ("before optimizer", "after_step")],
)
def test_a_loop_that_leaves_a_call_out_fails_and_is_told_which(method: Any, calls: str, named: str) -> None:
    session = session_of(method)
    run(session, begun(session), range(1, 4), calls=calls)
    with pytest.raises(HealthError, match=rf"called around 0 of 3 optimizer steps.*call {named} "):
        session.end(3)
    session.close()


def test_a_loop_that_gives_every_step_the_same_number_fails() -> None:
    session = session_of(MGPO())
    run(session, begun(session), range(1, 4), renumber=True)
    with pytest.raises(HealthError, match="called around 1 of 3 optimizer steps"):
        session.end(3)
    session.close()


@BOTH
def test_training_in_evaluation_mode_perturbs_nothing_and_fails(method: Any, caplog: pytest.LogCaptureFixture) -> None:
    session = session_of(method, training=False)
    with caplog.at_level(logging.WARNING, "rankwise"):
        run(session, begun(session), range(1, 4))
    (told,) = caplog.messages
    assert told.startswith(f"{method.id}: ")
    assert "no layer computed with" in told
    assert session.figures() == {}
    with pytest.raises(HealthError, match=r"no layer computed with.*call session\.model\.train\(\)"):
        session.end(3)
    session.close()


def test_figures_are_of_the_layers_that_acted() -> None:
    session = session_of(GGPO(beta=0.0, sigma=0.1))
    optimizer = begun(session)
    run(session, optimizer, range(1, 2))
    whole = session.figures()
    only = session.layers[FIRST].module
    for layer in session.layers.values():
        layer.module.train(layer.module is only)
    run(session, optimizer, range(2, 3))
    alone = session.figures()
    assert whole["ggpo_noise"] == pytest.approx(0.1)
    assert alone["ggpo_noise"] == pytest.approx(0.1)
    schedule: Any = session.schedule
    assert schedule.acted == {FIRST}
    session.end(2)  # some layer acted in each step
    session.close()


@pytest.mark.parametrize("method", [GGPO(sigma=0.0), MGPO(rho=0.0)], ids=["sigma 0", "rho 0"])
def test_settings_that_ask_for_plain_lora_need_no_layer_to_act(method: Any) -> None:
    session = session_of(method, training=False)
    run(session, begun(session), range(1, 3))
    session.end(2)
    session.close()


# --- pairs that sit a step out ------------------------------------------------------------------------------------


def spoiled(session: Session, *names: str) -> list[Any]:
    """From here on the gradients of these layers' lora_B are NaN."""
    return [session.layers[name].lora_B.register_hook(lambda gradient: gradient * float("nan")) for name in names]


def kept(session: Session) -> dict[str, Tensor]:
    schedule: Any = session.schedule
    return {name: value for name, value in schedule.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.parametrize(
    "method",
    [GGPO(), GGPO(norm_ema=0.5), MGPO(), MGPO(own_momentum="always")],
    ids=["ggpo", "ggpo mean", "mgpo", "mgpo own"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_a_pair_with_a_gradient_that_is_not_finite_teaches_the_schedule_nothing(method: Any, first: bool) -> None:
    session = session_of(method)
    optimizer = begun(session)
    if not first:
        run(session, optimizer, range(1, 3))
    before = kept(session)
    handles = spoiled(session, FIRST)
    run(session, optimizer, range(1, 2) if first else range(3, 4))
    after = kept(session)
    assert len(after) >= 4
    for name, value in after.items():
        alone = name.endswith(FIRST) or (first and name.startswith("momentum_A"))  # at lora_B = 0 it has no gradient
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)) == alone, name
    for handle in handles:
        handle.remove()
    run(session, optimizer, range(2, 3) if first else range(4, 5))
    assert all(value.isfinite().all() for value in kept(session).values())
    session.end(2 if first else 4)
    session.close()


@BOTH
def test_a_step_that_every_pair_sits_out_teaches_nothing_and_blames_nobody(
    method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session = session_of(method)
    optimizer = begun(session)
    run(session, optimizer, range(1, 3))
    before = kept(session)
    spoiled(session, *session.layers)
    with caplog.at_level(logging.WARNING, "rankwise"):
        run(session, optimizer, range(3, 4))
    assert all(torch.equal(value, before[name]) for name, value in kept(session).items())
    assert not caplog.messages
    session.close()


@BOTH
def test_a_step_that_the_loss_scaler_skips_teaches_nothing(method: Any) -> None:
    Accelerator(cpu=True)
    session = session_of(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(session.optimizers(ARGS, 6)[0], device_placement=False, scaler=scaler)
    session.begin(optimizer, 6)

    def step(number: int) -> None:
        session.before_step(number)
        scaler.scale(session.model(**causal_batch(number)).loss).backward()
        session.before_optimizer_step(number)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(number)

    step(1), step(2)
    before = kept(session)
    (handle,) = spoiled(session, FIRST)
    trained = {name: layer.lora_B.detach().clone() for name, layer in session.layers.items()}
    step(3)
    assert all(torch.equal(layer.lora_B, trained[name]) for name, layer in session.layers.items())
    assert all(torch.equal(value, before[name]) for name, value in kept(session).items())
    handle.remove()
    step(4)
    assert not any(torch.equal(value, before[name]) for name, value in kept(session).items())
    session.end(4)
    assert schedule_check(session).status == "passed"
    session.close()


@pytest.mark.parametrize("method", ["lora", GGPO()], ids=["lora", "ggpo"])
def test_a_first_step_in_which_a_pair_is_not_finite_still_reached_its_layer(method: Any) -> None:
    session = session_of(method)
    optimizer = begun(session)
    handles = spoiled(session, FIRST)
    run(session, optimizer, range(1, 2))
    handles[0].remove()
    run(session, optimizer, range(2, 4))
    session.end(3)
    assert session.health.gradients.skipped()[FIRST] == 1
    session.close()


# --- what is told, and what is refused ----------------------------------------------------------------------------


def test_facts_that_show_when_training_begins_are_notes_of_the_session() -> None:
    session = session_of(MGPO(own_momentum="always"))
    begun(session)
    assert any("momentum of our own, decay 0.9, stands in" in note for note in session.notes)
    begun(session)
    assert len(set(session.notes)) == len(session.notes)
    session.close()


def test_layers_with_a_forward_of_their_own_are_told_among_the_notes() -> None:
    model = tiny_llama()
    for block in model.model.layers:
        block.self_attn.q_proj.forward = block.self_attn.q_proj.forward
    session = attach(model, GGPO(), r=2, target_modules=["q_proj"])
    begun(session)
    assert any("the noise of 2 of 2 layers" in note and "second product" in note for note in session.notes)
    session.close()


def test_a_composition_over_a_pair_optimizer_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    session = attach(tiny_llama(), [LoRARITE(), GGPO()], r=2, target_modules=["q_proj"])
    with caplog.at_level(logging.WARNING, "rankwise"):
        begun(session)
    assert not caplog.messages
    assert sum("nobody has measured it over lora-rite's steps" in note for note in session.plan.notes) == 1
    session.close()


def test_a_state_is_not_restored_into_a_session_that_did_not_come_from_it(tmp_path: Path) -> None:
    session = session_of("lora")
    optimizer = begun(session)
    run(session, optimizer, range(1, 3))
    session.save(tmp_path / "checkpoint-2", optimizer=optimizer)
    other = session_of("lora")
    fresh = other.optimizers(ARGS, 6)[0]
    with pytest.raises(
        CheckpointError,
        match=r"the session is at step 0 and .*checkpoint-2 was saved at step 2: .*rw\.resume\(model, checkpoint\)",
    ):
        other.restore(tmp_path / "checkpoint-2", fresh)
    assert not fresh.state


def test_a_plan_file_is_used_with_what_the_methods_settings_of_today_have_to_say(tmp_path: Path) -> None:
    made = plan(tiny_llama(), GGPO(sigma=0.03), r=2, target_modules=["q_proj"])
    made.save(tmp_path / "plan.json")
    given = RankPlan.load(tmp_path / "plan.json")
    loud = attach(tiny_llama(), GGPO(sigma=0.5), plan=given)
    assert any("warning: sigma 0.5" in note for note in loud.plan.notes)
    loud.close()
    off = attach(tiny_llama(), GGPO(sigma=0.0), plan=loud.plan)
    assert any("sigma is 0" in note for note in off.plan.notes)
    assert not any("sigma 0.5" in note or "1.4 times" in note for note in off.plan.notes), "said of other settings"
    off.close()
    again = attach(tiny_llama(), GGPO(sigma=0.03), plan=given)
    assert again.plan.notes == given.notes
    again.close()
