"""SoRA's equations and its schedule on small models (the acceptance properties of sora.md section 6)."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rankwise as rw
from rankwise.adapters.gates import CONTAINER
from rankwise.adapters.state import STATE_FILE, FoldState
from rankwise.errors import CheckpointError, ConfigError, ExportError, HealthError
from rankwise.export.fold import fold
from rankwise.methods.schedule import stage_ends
from rankwise.methods.sora import (
    SoRA,
    density_aim,
    gate_adam,
    official_threshold,
    soft_threshold,
    steered,
)

numbers = st.floats(-4, 4, allow_nan=False)
sizes = st.floats(0, 2, allow_nan=False)


class Net(nn.Module):
    """Two linear layers of unequal shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(10, 4, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.down(torch.tanh(self.up(x)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


def batches(count: int) -> list[dict[str, Tensor]]:
    source = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(8, 6, generator=source), "labels": torch.randint(4, (8,), generator=source)}
        for _ in range(count)
    ]


def arguments(lr: float = 3e-2, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"learning_rate": lr, "lr_scheduler_type": "constant", **settings})


def trained(method: SoRA | str, steps: int = 60, r: int = 4, lr: float = 3e-2, **settings: Any) -> rw.Session:
    """A session trained for `steps` steps in a bare loop."""
    session = rw.attach(net(), method, r=r, lora_alpha=2 * r, target_modules=["up", "down"], seed=0)
    optimizer, scheduler = session.optimizers(arguments(lr, **settings), steps)
    walk(session, optimizer, scheduler, steps)
    return session


def walk(
    session: rw.Session, optimizer: Any, scheduler: Any, steps: int, *, first: int = 1, last: int | None = None
) -> None:
    """Steps `first` to `last` of a run of `steps`; its end only if it comes so far."""
    rows = batches(steps)
    session.begin(optimizer, steps)
    for step in range(first, (last or steps) + 1):
        session.before_step(step)
        session.model(**rows[step - 1]).loss.backward()
        session.before_optimizer_step(step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        session.after_step(step)
    if last is None:
        session.end(steps)


# --- equations ----------------------------------------------------------------------------------------------------


@given(st.lists(numbers, min_size=1, max_size=5), sizes, sizes)
def test_soft_thresholds_add_up_are_odd_and_never_stretch(values: list[float], a: float, b: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    assert torch.allclose(soft_threshold(soft_threshold(x, b), a), soft_threshold(x, a + b), atol=1e-12)
    assert torch.equal(soft_threshold(-x, a), -soft_threshold(x, a))
    assert (soft_threshold(x, a).diff().abs() <= x.diff().abs() + 1e-12).all()
    assert torch.equal(soft_threshold(x, 0.0), x)


@given(numbers, sizes)
def test_the_soft_threshold_is_the_proximal_map(x: float, xi: float) -> None:
    grid = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    best = grid[(xi * grid.abs() + (grid - x).square() / 2).argmin()]
    assert abs(float(soft_threshold(torch.tensor(x, dtype=torch.float64), xi) - best)) <= 1e-3


def test_official_thresholds_do_not_add_up() -> None:
    x = torch.tensor([0.9], dtype=torch.float64)
    assert not torch.allclose(official_threshold(official_threshold(x, 0.25), 0.25), official_threshold(x, 0.5))


def test_the_official_map_by_hand() -> None:
    below = math.nextafter(0.5, 0)
    x = torch.tensor([1.0, -0.75, 0.5, below, 0.25, 0.375, -0.25, 0.125], dtype=torch.float64)
    expected = torch.tensor([0.75, -0.5, 0.25, 0.0, 0.25, 0.0, -0.25, 0.0], dtype=torch.float64)
    assert torch.equal(official_threshold(x, 0.25), expected)


def test_without_a_threshold_the_gate_step_is_adam_with_eps_outside() -> None:
    gate, other = torch.tensor([0.5, -1.0]), nn.Parameter(torch.tensor([0.5, -1.0]))
    first, second = torch.zeros(2), torch.zeros(2)
    reference = torch.optim.AdamW([other], lr=1e-2, weight_decay=0.1, eps=1e-8)
    for step in range(1, 9):
        grad = torch.tensor([0.3, -2.0]) * math.cos(step)
        gate_adam(
            gate,
            grad,
            first,
            second,
            step=step,
            lr=1e-2,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.1,
            bias_correction=True,
        )
        other.grad = grad.clone()
        reference.step()
    assert torch.allclose(gate, other.detach(), atol=1e-6)


def test_without_gradients_a_gate_shrinks_by_the_threshold_alone() -> None:
    gate = torch.tensor([1.0, -0.35, 0.05], dtype=torch.float64)
    start = gate.clone()
    for step in range(1, 8):
        gate = soft_threshold(gate, 0.1)
        assert torch.allclose(gate.abs(), (start.abs() - step * 0.1).clamp(min=0), atol=1e-12)


def test_the_aim_is_a_line_between_a_sixth_and_five_sixths() -> None:
    assert [density_aim(step, 600, 0.4) for step in (1, 100, 300, 500, 600)] == pytest.approx([1, 1, 0.7, 0.4, 0.4])
    assert steered(2.0, density=0.9, aim=0.8) == 3.0
    assert steered(3.0, density=0.7, aim=0.8) == 2.0
    assert steered(1000.0, density=0.9, aim=0.8) == 1000.0
    assert steered(0.01, density=0.1, aim=0.8) == 0.01


def test_stages_share_the_run_equally() -> None:
    assert stage_ends(3, 10) == (4, 7, 10)
    assert stage_ends(1, 10) == (10,)


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_density": 0.0}, "target_density"),
        ({"threshold": -1.0}, "threshold"),
        ({"threshold": ()}, "threshold"),
        ({"threshold_end": 1.0}, "needs both"),
        ({"threshold": 0.0, "threshold_end": 1.0, "threshold_stages": 1}, "is no path"),
        ({"threshold": 0.0, "threshold_end": 1.0, "threshold_stages": 4, "threshold_path": "exp_linear"}, "above 0"),
        ({"threshold": (1.0, 2.0), "threshold_end": 1.0, "threshold_stages": 4}, "one number"),
        ({"prox": "hard"}, "prox"),
        ({"gate_betas": (0.9, 1.0)}, "gate_betas"),
        ({"gate_lr": math.inf}, "gate_lr"),
        ({"gate_lr": 0.0}, "gate_lr: .* set train_gates: false"),
        ({"l1": -1}, "l1"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SoRA(**settings)


def test_a_path_and_a_list_give_the_thresholds() -> None:
    assert SoRA(threshold=0.0, threshold_end=3.0, threshold_stages=4).thresholds == (0.0, 1.0, 2.0, 3.0)
    assert SoRA(threshold=(0.5, 0.1)).thresholds == (0.5, 0.1)
    assert SoRA(threshold=0.5).thresholds == (0.5,)
    assert SoRA().thresholds is None


# --- training -----------------------------------------------------------------------------------------------------


def test_the_neutral_setting_is_plain_lora_bit_for_bit() -> None:
    plain = trained("lora")
    gated = trained(SoRA(train_gates=False, gate_init="ones", threshold=0.0))
    for name, layer in plain.layers.items():
        assert torch.equal(layer.lora_A, gated.layers[name].lora_A)
        assert torch.equal(layer.lora_B, gated.layers[name].lora_B)


def test_zeros_are_dropped_at_export_and_the_logits_stay(tmp_path: Any) -> None:
    session = trained(SoRA(target_density=0.5), steps=200)
    ranks = session.schedule.live_ranks()
    zeros = {name: int((gate == 0).sum()) for name, gate in session.fold_state.gates.items()}
    assert {name: 4 - count for name, count in zeros.items()} == ranks
    assert 0 < sum(ranks.values()) < 8
    rows = batches(1)[0]
    session.model.eval()
    expected = session.model(rows["x"]).logits.detach()
    folded = fold(session.model, session.fold_state)
    assert folded.ranks == ranks
    base = net()
    for name, layer in folded.layers.items():
        base.get_submodule(name).weight.data += layer.scaling * layer.lora_B @ layer.lora_A
    found = base(rows["x"]).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


class Deep(nn.Module):
    """Six layers, enough gates for a density to be steered."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(6))

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return SimpleNamespace(loss=nn.functional.cross_entropy(x[:, :4], labels))


@pytest.mark.parametrize("target", [0.8, 0.5])
def test_the_default_reaches_the_density_that_was_asked_for(target: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Deep()
    session = rw.attach(model, SoRA(target_density=target), r=8, lora_alpha=16, target_modules=r"layers\.\d", seed=0)
    optimizer, scheduler = session.optimizers(arguments(2e-2, lr_scheduler_type="linear"), 300)
    source = torch.Generator().manual_seed(1)
    session.begin(optimizer, 300)
    for step in range(1, 301):
        x = torch.randn(16, 16, generator=source)
        session.before_step(step)
        session.model(x=x, labels=x[:, 4:8].argmax(-1)).loss.backward()
        session.before_optimizer_step(step)
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        session.after_step(step)
    session.end(300)
    assert session.figures()["sora_density"] == pytest.approx(target, abs=0.1)


def test_density_counts_the_parameters_of_unequal_layers() -> None:
    session = rw.attach(net(), SoRA(), r=2, lora_alpha=4, target_modules=["up", "down"], seed=0)
    schedule = session.schedule
    schedule.gates.write("up", torch.tensor([0.0, 1.0]))
    schedule.gates.write("down", torch.tensor([1.0, 1.0]))
    assert schedule._density(schedule.live_ranks()) == pytest.approx((16 + 2 * 14) / (2 * 16 + 2 * 14))


def test_events_tell_what_became_zero() -> None:
    session = trained(SoRA(target_density=0.5), steps=200)
    changes = session.drain_changes()
    last = {line["layer"]: line["to"] for line in changes if "layer" in line}
    assert last == {name: rank for name, rank in session.schedule.live_ranks().items() if rank != 4}
    events = {line["step"]: line for line in changes if "layer" not in line}
    for step, event in events.items():
        moved = sum(line["to"] - line["from"] for line in changes if line["step"] == step and "layer" in line)
        assert event["kind"] == ("revive" if moved > 0 else "prune")
        assert ("came back" in event["reason"], "became zero" in event["reason"]) != (False, False)
    assert {event["kind"] for event in events.values()} == {"prune", "revive"}


def test_gates_are_in_no_other_group_and_no_saved_adapter(tmp_path: Any) -> None:
    session = rw.attach(net(), SoRA(), r=2, lora_alpha=4, target_modules=["up", "down"], seed=0)
    optimizer, _ = session.optimizers(arguments(), 10)
    gates = {id(gate) for gate in session.schedule.gates.parameters()}
    holders = [group.get("kind") for group in optimizer.param_groups if {id(p) for p in group["params"]} & gates]
    assert holders == ["gate"]
    assert hasattr(session.model, CONTAINER)
    session.save(tmp_path / "checkpoint-0", step=0)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-0" / "adapter_model.safetensors")
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in saved)
    assert set(load_file(tmp_path / "checkpoint-0" / "rankwise_state.safetensors")) >= {"gate.up", "gate.down"}
    session.close()
    assert not hasattr(session.model, CONTAINER)


def test_while_gates_stand_nothing_is_merged_saved_or_folded_without_them(tmp_path: Any) -> None:
    session = trained(SoRA(target_density=0.5), steps=20)
    for call in (session.model.merge_adapter, session.model.merge_and_unload, session.layers["up"].module.merge):
        with pytest.raises(ExportError, match="trained beside gates on its ranks"):
            call()
    with pytest.raises(ExportError, match="the state holds none for them"):
        fold(session.model)
    session.model.save_pretrained(tmp_path / "plain")
    kept = FoldState.load(tmp_path / "plain" / STATE_FILE)
    assert all(torch.equal(gate, kept.gates[name]) for name, gate in session.fold_state.gates.items())
    session.close()
    session.model.merge_adapter()


def test_another_optimizer_is_refused_with_what_to_pass() -> None:
    session = rw.attach(net(), SoRA(), r=2, lora_alpha=4, target_modules=["up", "down"], seed=0)
    factors = [p for layer in session.layers.values() for p in (layer.lora_A, layer.lora_B)]
    with pytest.raises(ConfigError, match=r"session\.optimizers"):
        session.begin(torch.optim.AdamW([*factors, *session.schedule.gates.parameters()], lr=1e-3), 10)


def test_later_stages_learn_and_each_wants_a_checkpoint() -> None:
    session = rw.attach(
        net(), SoRA(threshold=(0.0, 0.5, 1.0)), r=2, lora_alpha=4, target_modules=["up", "down"], seed=0
    )
    optimizer, scheduler = session.optimizers(arguments(lr_scheduler_type="linear"), 30)
    rates = []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert min(rates) > 0
    assert rates[0] == rates[10] == rates[20]
    assert session.checkpoints(30) == (10, 20, 30)


def test_the_rate_starts_anew_where_a_stage_does_in_a_run_that_cannot_be_cut_equally() -> None:
    session = rw.attach(
        net(), SoRA(threshold=(0.0, 0.5, 1.0)), r=2, lora_alpha=4, target_modules=["up", "down"], seed=0
    )
    optimizer, scheduler = session.optimizers(arguments(lr_scheduler_type="linear"), 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert session.checkpoints(10) == (4, 7, 10)
    assert [step for step in range(10) if rates[step] == max(rates)] == [0, 4, 7]


def test_the_guard_counts_what_the_gates_leave() -> None:
    with pytest.warns(UserWarning, match="every gate became zero: the adapter that is exported equals the base model"):
        session = trained(SoRA(threshold=(0.0, 100.0), threshold_scale="constant"), steps=6)
    assert not sum(session.schedule.live_ranks().values())
    update = next(check for check in session.health.checks if check.id == "update")
    assert update.status == "not exercised"
    assert update.message == "every rank of every layer was pruned: the adapter equals the base model"


@pytest.mark.parametrize("cut", [7, 31])
def test_a_resumed_run_goes_on_bit_for_bit(cut: int, tmp_path: Any) -> None:
    steps, method = 60, SoRA(target_density=0.5)
    whole = trained(method, steps)
    session = rw.attach(net(), method, r=4, lora_alpha=8, target_modules=["up", "down"], seed=0)
    optimizer, scheduler = session.optimizers(arguments(), steps)
    walk(session, optimizer, scheduler, steps, last=cut)
    folder = tmp_path / f"checkpoint-{cut}"
    session.save(folder, optimizer=optimizer, scheduler=scheduler)
    resumed = rw.resume(net(), folder)
    optimizer, scheduler = resumed.optimizers(arguments(), steps)
    assert resumed.restore(folder, optimizer, scheduler) == cut
    walk(resumed, optimizer, scheduler, steps, first=cut + 1)
    for name, layer in whole.layers.items():
        assert torch.equal(layer.lora_A, resumed.layers[name].lora_A)
        assert torch.equal(layer.lora_B, resumed.layers[name].lora_B)
    gates = resumed.fold_state.gates
    assert all(torch.equal(gate, gates[name]) for name, gate in whole.fold_state.gates.items())


def test_changes_are_told_without_a_gap_wherever_a_run_goes_on(tmp_path: Any) -> None:
    steps, method = 60, SoRA(target_density=0.5)
    for cut in (11, 23, 37):
        session = rw.attach(net(), method, r=4, lora_alpha=8, target_modules=["up", "down"], seed=0)
        ranks = dict(session.plan.ranks)
        optimizer, scheduler = session.optimizers(arguments(), steps)
        walk(session, optimizer, scheduler, steps, last=cut)
        folder = tmp_path / f"checkpoint-{cut}"
        session.save(folder, optimizer=optimizer, scheduler=scheduler)
        changes = list(session.drain_changes())
        resumed = rw.resume(net(), folder)
        optimizer, scheduler = resumed.optimizers(arguments(), steps)
        resumed.restore(folder, optimizer, scheduler)
        walk(resumed, optimizer, scheduler, steps, first=cut + 1)
        for line in (*changes, *resumed.drain_changes()):
            if "layer" in line:
                assert line["from"] == ranks[line["layer"]]
                ranks[line["layer"]] = line["to"]
        assert ranks == resumed.schedule.live_ranks()


def test_the_gates_of_the_best_checkpoint_come_back_with_its_factors(tmp_path: Any) -> None:
    steps = 60
    session = rw.attach(net(), SoRA(target_density=0.5), r=4, lora_alpha=8, target_modules=["up", "down"], seed=0)
    optimizer, scheduler = session.optimizers(arguments(), steps)
    walk(session, optimizer, scheduler, steps, last=5)
    session.save(tmp_path / "checkpoint-5", optimizer=optimizer, scheduler=scheduler)
    saved = session.fold_state.gates
    walk(session, optimizer, scheduler, steps, first=6)
    assert any(not torch.equal(gate, saved[name]) for name, gate in session.fold_state.gates.items())
    session.drain_changes()
    session.take_back(tmp_path / "checkpoint-5")
    assert all(torch.equal(gate, saved[name]) for name, gate in session.fold_state.gates.items())
    changes = session.drain_changes()
    assert changes
    assert {line["kind"] for line in changes} == {"best"}
    assert all(line["to"] == 4 for line in changes)


def test_the_state_of_another_plan_is_refused() -> None:
    session = rw.attach(net(), SoRA(), r=2, lora_alpha=4, target_modules=["up", "down"], seed=0)
    other = rw.attach(net(), SoRA(), r=3, lora_alpha=6, target_modules=["up", "down"], seed=0)
    with pytest.raises(CheckpointError, match="of another rank"):
        session.schedule.load_state_dict(other.schedule.state_dict())


def test_a_zero_gate_may_come_back_unless_it_is_frozen() -> None:
    for freeze, expected in ((False, True), (True, False)):
        session = rw.attach(
            net(),
            SoRA(threshold=0.0, freeze_dead=freeze),
            r=2,
            lora_alpha=4,
            target_modules=["up", "down"],
            seed=0,
        )
        with torch.no_grad():
            for layer in session.layers.values():
                layer.lora_B.normal_(generator=torch.Generator().manual_seed(0))
        session.schedule.gates.write("up", torch.tensor([0.0, 1.0]))
        optimizer, scheduler = session.optimizers(arguments(), 5)
        walk(session, optimizer, scheduler, 5)
        assert bool(session.schedule.gates.value("up")[0]) is expected


def test_s7_without_gradients_a_gate_falls_by_lambda_times_the_rate_of_every_step() -> None:
    session = rw.attach(
        net(), SoRA(threshold=4.0, gate_init="ones"), r=2, lora_alpha=4, target_modules=["up", "down"], seed=0
    )
    optimizer, scheduler = session.optimizers(arguments(lr_scheduler_type="linear"), 10)
    session.begin(optimizer, 10)
    gate = 1.0
    for step, batch in enumerate(batches(10), 1):
        session.before_step(step)
        (session.model(**batch).loss * 0).backward()
        gate = max(gate - 4.0 * optimizer.param_groups[0]["lr"], 0.0)
        session.before_optimizer_step(step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        session.after_step(step)
        for value in session.fold_state.gates.values():
            assert value.tolist() == pytest.approx([gate] * 2, abs=1e-6)
    assert 0.3 < gate < 0.4
    session.close()


def test_gates_that_no_step_reached_fail_the_run() -> None:
    session = rw.attach(net(), SoRA(), r=2, lora_alpha=4, target_modules=["up", "down"], seed=0)
    optimizer, _ = session.optimizers(arguments(), 6)
    session.schedule.begin(optimizer, 6)
    session.schedule.after_step(1)
    assert "never moved" in session.schedule.fault().message


def test_a_run_whose_schedule_is_never_called_fails() -> None:
    session = rw.attach(net(), SoRA(), r=2, lora_alpha=4, target_modules=["up", "down"], seed=0)
    optimizer, _ = session.optimizers(arguments(), 6)
    session.begin(optimizer, 6)
    for step, rows in enumerate(batches(6), 1):
        session.model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.after_step(step)
    with pytest.raises(HealthError, match="schedule"):
        session.end(6)


def test_pair_optimizers_and_offsets_are_refused() -> None:
    for other in ("lora-pro", "lora-rite"):
        with pytest.raises(ConfigError, match="sora"):
            rw.Recipe.of([other, SoRA()])
