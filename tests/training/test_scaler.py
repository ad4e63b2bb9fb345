"""Under a loss scaler: schedules read gradients in their own unit, and a step that overflowed moves nothing."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from rankwise.methods.sora import SoRA
from rankwise.methods.xgblora import XGBLoRA
from rankwise.training.attach import attach
from rankwise.training.scaler import take_out_scale
from rankwise.training.session import Session
from tests.support.models import causal_batch, tiny_llama
from tests.training.jobs import factors
from tests.training.stand_ins import Counter, Counting

SCALE = 1024.0
ARGS = SimpleNamespace(learning_rate=1e-2, lr_scheduler_type="constant")


def started(methods: object) -> tuple[Session, AcceleratedOptimizer, torch.amp.GradScaler]:
    Accelerator(cpu=True)
    session = attach(tiny_llama(), methods, r=2, target_modules=["q_proj"])  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = AcceleratedOptimizer(session.optimizers(ARGS, 3)[0], device_placement=False, scaler=scaler)
    session.begin(optimizer, 3)
    return session, optimizer, scaler


def step(session: Session, optimizer: AcceleratedOptimizer, number: int, *, clip: bool = False, factor: float = 1.0):
    session.before_step(number)
    loss = session.model(**causal_batch(number)).loss * factor
    optimizer.scaler.scale(loss).backward()
    if clip:
        optimizer.scaler.unscale_(optimizer.optimizer)
        torch.nn.utils.clip_grad_norm_(session.model.parameters(), 1e6)
    session.before_optimizer_step(number)
    optimizer.step()
    optimizer.zero_grad()
    session.after_step(number)


@pytest.mark.parametrize("clip", [True, False])
def test_a_schedule_reads_gradients_in_their_own_unit_whether_the_loop_clips_or_not(clip: bool):
    session, optimizer, _ = started(Counting())
    plain = attach(tiny_llama(), "lora", r=2, target_modules=["q_proj"])
    plain.model(**causal_batch(1)).loss.backward()
    wanted = next(iter(plain.layers.values())).lora_B.grad
    step(session, optimizer, 1, clip=clip)
    assert isinstance(session.schedule, Counter)
    assert torch.allclose(session.schedule.seen[0], wanted, rtol=1e-5)
    session.close()


def test_a_step_that_the_scaler_skips_counts_for_the_schedule_and_fails_no_check():
    session, optimizer, _ = started([Counting(), "lora-rite"])
    step(session, optimizer, 1, factor=float("inf"))
    assert optimizer.step_was_skipped
    step(session, optimizer, 2)
    session.end(2)
    assert session.schedule.steps == 2
    assert (session.health.gradients.steps, session.health.status) == (1, "passed")
    session.close()


def test_soras_threshold_does_not_act_in_a_step_that_the_scaler_skips():
    session, optimizer, _ = started(SoRA(threshold=50.0, threshold_scale="lr", gate_init="ones"))  # 0.5 a step
    step(session, optimizer, 1, factor=float("inf"))
    assert optimizer.step_was_skipped
    assert all(bool((gate == 1).all()) for gate in session.fold_state.gates.values())
    step(session, optimizer, 2)
    assert all(bool((gate < 0.6).all()) for gate in session.fold_state.gates.values())
    session.close()


def test_a_skipped_step_still_counts_for_xgbloras_rounds():
    session, optimizer, _ = started(XGBLoRA(round_steps=2, layers_fraction=1.0))
    step(session, optimizer, 1, factor=float("inf"))
    assert not any(layer.lora_B.any() for layer in session.layers.values())
    assert not session.fold_state.boosters
    step(session, optimizer, 2)
    assert session.fold_state.boosters.keys() == session.layers.keys()
    session.close()


@pytest.mark.parametrize("method", ["lora-rite", "lora-pro"])
def test_a_pair_optimizer_steps_under_a_scaler_as_without_one_and_sits_an_overflow_out(method: str):
    session, optimizer, _ = started(method)
    plain = attach(tiny_llama(), method, r=2, target_modules=["q_proj"])
    alone, _ = plain.optimizers(ARGS, 3)
    plain.begin(alone, 3)
    for number in (1, 2):
        step(session, optimizer, number)
        plain.model(**causal_batch(number)).loss.backward()
        alone.step(), alone.zero_grad()
    before = {name: value.clone() for name, value in factors(session).items()}
    for name, value in factors(plain).items():
        assert torch.allclose(before[name], value, rtol=1e-5, atol=1e-7), name
    state = [value.clone() for own in optimizer.optimizer.state.values() for value in own.values()]
    step(session, optimizer, 3, factor=float("inf"))
    assert all(torch.equal(value, before[name]) for name, value in factors(session).items())
    after = [value for own in optimizer.optimizer.state.values() for value in own.values()]
    assert all(torch.equal(one, other) for one, other in zip(state, after, strict=True))
    session.close(), plain.close()


def test_gradients_are_divided_once():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(parameter.sum()).backward()
    for _ in range(2):
        take_out_scale(scaler, optimizer)
        assert torch.equal(parameter.grad, torch.ones(2))
    scaler.step(optimizer), scaler.update()
    take_out_scale(None, optimizer)
    take_out_scale(torch.amp.GradScaler("cpu", enabled=False), optimizer)
    assert torch.equal(parameter.grad, torch.ones(2))


def test_other_faults_of_the_scaler_are_not_hidden():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"after step\(\)"):
        take_out_scale(scaler, optimizer)
