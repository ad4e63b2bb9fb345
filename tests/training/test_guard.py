"""A run that trained nothing, trained the wrong thing or broke half-way never says success."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rankwise.errors import ConfigError, HealthError
from rankwise.training.attach import Calibration, attach
from rankwise.training.guard import HealthCheck
from rankwise.training.session import Session
from tests.support.models import causal_batch, tiny_llama
from tests.training.jobs import Job, factors, new_session

STEPS = 4


def started(session: Session, **options: object) -> torch.optim.Optimizer:
    optimizer, _ = session.optimizers(
        SimpleNamespace(**{"learning_rate": 1e-2, "lr_scheduler_type": "constant", **options}), STEPS
    )
    session.begin(optimizer, STEPS)
    return optimizer


def step(session: Session, optimizer: torch.optim.Optimizer, number: int, factor: float = 1.0) -> None:
    session.before_step(number)
    loss = session.model(**causal_batch(number)).loss * factor
    loss.backward()
    session.before_optimizer_step(number)
    optimizer.step()
    optimizer.zero_grad()
    session.after_step(number)
    session.logged(number, {"loss": float(loss.detach())})


def check_of(session: Session, name: str) -> HealthCheck:
    return next(check for check in session.health.checks if check.id == name)


def test_a_sound_run_passes_every_check_with_a_figure(tmp_path: Path):
    session = new_session(Job(folder="", dropout=0.0))
    optimizer = started(session)
    assert session.health.status == "running"
    for number in range(1, STEPS + 1):
        step(session, optimizer, number)
    session.end(STEPS)
    assert session.health.status == "passed"
    assert {check.status for check in session.health.checks} == {"passed"}
    assert all(check.measured is not None for check in session.health.checks)
    smallest = min(
        layer.scaling * float(torch.linalg.matrix_norm((layer.lora_B @ layer.lora_A).detach()))
        for layer in session.layers.values()
    )
    assert check_of(session, "update").measured == pytest.approx(smallest, rel=1e-5)
    session.health.save(tmp_path / "health.json")
    stored = json.loads((tmp_path / "health.json").read_text())
    assert (stored["format"], stored["version"], stored["status"]) == ("rankwise-health", 1, "passed")
    assert set(stored["checks"][0]) == {"id", "stage", "status", "measured", "limit", "message", "advice"}
    assert [c["stage"] for c in stored["checks"]] == sorted(
        (c["stage"] for c in stored["checks"]), key=["before", "during", "after"].index
    )


def test_calibration_proves_that_every_layer_is_reached():
    session = new_session(Job(folder="", method="gora"))
    check = check_of(session, "reached")
    assert (check.status, check.measured) == ("passed", 3)


def test_a_learning_rate_of_zero_is_refused_before_the_first_step():
    session = new_session(Job(folder=""))
    optimizer = torch.optim.AdamW([p for p in session.model.parameters() if p.requires_grad], lr=0.0)
    with pytest.raises(ConfigError, match="the learning rate is 0 in every parameter group"):
        session.begin(optimizer, STEPS)


def test_warm_up_from_zero_is_no_learning_rate_of_zero():
    session = new_session(Job(folder=""))
    optimizer = started(session, lr_scheduler_type="linear", warmup_steps=2)
    step(session, optimizer, 1)
    assert check_of(session, "movement").status == "pending"


def test_an_optimizer_made_before_attach_is_refused():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    session = attach(model, "lora", r=2)
    with pytest.raises(ConfigError, match=r"misses \d+ of \d+ trainable parameters .*build it after attach"):
        session.begin(optimizer, STEPS)


def test_a_schedule_shorter_than_the_run_is_refused():
    session = new_session(Job(folder=""))
    optimizer, _ = session.optimizers(SimpleNamespace(learning_rate=1e-3, lr_scheduler_type="linear"), STEPS)
    with pytest.raises(ConfigError, match="the run makes 9 steps but its learning-rate schedule was built for 4"):
        session.begin(optimizer, 9)


def test_an_adapter_that_something_froze_is_refused():
    session = new_session(Job(folder=""))
    optimizer, _ = session.optimizers(SimpleNamespace(learning_rate=1e-3), STEPS)
    session.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        session.begin(optimizer, STEPS)


def test_a_trainable_base_parameter_is_refused_because_no_export_would_hold_it():
    session = new_session(Job(folder=""))
    session.model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(
        ConfigError, match=r"1 parameters outside the adapter are trainable .*embed_tokens.*modules_to_save"
    ):
        started(session)


def test_what_modules_to_save_names_may_train():
    session = attach(tiny_llama(), "lora", r=2, modules_to_save=["lm_head"])
    started(session)
    assert check_of(session, "wiring").status == "passed"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails_and_leaves_health_json(tmp_path: Path, value: float):
    session = new_session(Job(folder=""))
    session.health.folder = tmp_path
    optimizer = started(session)
    step(session, optimizer, 1)
    with pytest.raises(HealthError, match=r"health check 'loss' failed.*lower the learning rate"):
        session.logged(2, {"loss": value})
    stored = json.loads((tmp_path / "health.json").read_text())
    assert stored["status"] == "failed"
    assert [c["measured"] for c in stored["checks"] if c["id"] == "loss"] == [str(value)]


def test_one_skipped_step_is_forgiven_and_two_of_three_are_not():
    session = new_session(Job(folder="", dropout=0.0))
    optimizer = started(session)
    bad = next(iter(session.layers))
    session.layers[bad].lora_A.register_hook(lambda gradient: gradient * math.nan)
    step(session, optimizer, 1)
    assert check_of(session, "gradients").status == "passed"
    assert check_of(session, "gradients").measured == 1
    with pytest.raises(HealthError, match=rf"most for '{bad}': 2 of 2 steps"):
        step(session, optimizer, 2)


def test_factors_that_do_not_move_fail():
    session = new_session(Job(folder="", dropout=0.0))
    optimizer = started(session)
    before = factors(session)
    session.model(**causal_batch(0)).loss.backward()
    optimizer.step()
    for name, layer in session.layers.items():  # as if the optimizer held copies of the parameters
        layer.lora_A.data.copy_(before[f"{name}.A"])
        layer.lora_B.data.copy_(before[f"{name}.B"])
    with pytest.raises(HealthError, match=r"health check 'movement' failed.*not those of"):
        session.logged(1, {})


def test_an_update_of_zero_after_gradients_fails():
    session = new_session(Job(folder="", dropout=0.0))
    optimizer = started(session)
    step(session, optimizer, 1)
    name = next(iter(session.layers))
    session.layers[name].lora_B.data.zero_()
    with pytest.raises(HealthError, match=rf"health check 'update' failed.*not '{name}'"):
        session.end(1)


def test_a_layer_that_no_gradient_reached_is_named_and_no_failure():
    session = new_session(Job(folder="", dropout=0.0))
    optimizer = started(session)
    name = next(iter(session.layers))
    for factor in (session.layers[name].lora_A, session.layers[name].lora_B):
        factor.register_hook(torch.zeros_like)
    for number in range(1, 3):
        step(session, optimizer, number)
    session.end(2)
    assert session.health.status == "passed"
    assert check_of(session, "reached").status == "not exercised"
    assert name in check_of(session, "reached").message
    assert (
        f"not exercised, because no gradient reached them: 1 layers ('{name}')" in check_of(session, "update").message
    )


@pytest.mark.parametrize("name", ["extra", "expertise"])
def test_a_layer_that_the_loss_does_not_depend_on_fails_after_the_first_step(name: str):
    model = tiny_llama()
    model.model.add_module(name, torch.nn.Linear(32, 32))
    session = attach(model, "lora", r=2)
    optimizer = started(session)
    with pytest.raises(HealthError, match=rf"no gradient reached 1 of \d+ layers .*'model.{name}'.*exclude_modules"):
        step(session, optimizer, 1)


def test_warm_up_at_rate_zero_does_not_hide_a_layer_out_of_reach():
    model = tiny_llama()
    model.model.extra = torch.nn.Linear(32, 32)
    session = attach(model, "lora", r=2)
    optimizer = started(session)
    optimizer.param_groups[0]["lr"] = 0.0
    step(session, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.raises(HealthError, match="health check 'reached' failed"):
        step(session, optimizer, 2)


def test_an_expert_that_routing_passed_over_is_not_exercised():
    model = tiny_llama()
    model.model.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    session = attach(model, "lora", r=2)
    optimizer = started(session)
    step(session, optimizer, 1)
    session.end(1)
    check = check_of(session, "reached")
    assert (session.health.status, check.status) == ("passed", "not exercised")
    assert "model.experts.0" in check.message


def test_a_layer_that_calibration_was_allowed_to_miss_may_stay_out_of_reach():
    model = tiny_llama()
    model.model.extra = torch.nn.Linear(32, 32)
    allowed = Calibration(batches=[causal_batch()], on_unused="min")
    session = attach(model, "gora", r=2, calibration=allowed)
    assert session.calibration is not None
    assert session.calibration.unreached == ("model.extra",)
    optimizer = started(session)
    step(session, optimizer, 1)
    session.end(1)
    check = check_of(session, "reached")
    assert (session.health.status, check.status) == ("passed", "not exercised")
    assert "model.extra" in check.message


def test_a_run_in_which_nothing_had_a_gradient_fails():
    session = new_session(Job(folder="", dropout=0.0))
    optimizer = started(session)
    step(session, optimizer, 1, factor=0.0)
    with pytest.raises(HealthError, match="no layer had a gradient in 1 steps"):
        session.end(1)


def test_a_run_without_a_step_says_not_exercised():
    session = new_session(Job(folder=""))
    started(session)
    session.end(0)
    assert {c.status for c in session.health.checks if c.stage != "before"} == {"not exercised"}


def test_counters_and_movement_survive_a_save():
    session = new_session(Job(folder="", dropout=0.0))
    optimizer = started(session)
    step(session, optimizer, 1)
    state = json.loads(json.dumps(session.health.state_dict()))
    other = new_session(Job(folder=""))
    other.health.load_state_dict(state)
    assert other.health.state_dict() == session.health.state_dict()
    assert all(state["moved"].values())
