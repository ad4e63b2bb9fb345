"""GGPO and MGPO across a checkpoint: bit-equal, and another plan's or method's state is refused by name."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer

from rankwise.adapters.checkpoint import read_safetensors
from rankwise.adapters.fingerprint import weights_fingerprint
from rankwise.adapters.state import FoldState
from rankwise.errors import CheckpointError
from rankwise.methods.ggpo import GGPO, MGPO
from rankwise.methods.perturbing import PerturbationSchedule
from tests.methods.perturbed import Adapted, adapted, train

METHODS = [
    GGPO(sigma=0.1, beta=3.0, norm_ema=0.5, ramp="cosine"),
    GGPO(sigma=0.1, beta=0.0),
    MGPO(rho=0.3),
    MGPO(rho=0.3, own_momentum="always"),
    GGPO(sigma=0.0),
]
every = pytest.mark.parametrize("method", METHODS, ids=["ggpo", "flat-lora", "mgpo", "mgpo own", "sigma 0"])


def through_a_file(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """As a checkpoint keeps it: tensors in safetensors, the rest in JSON."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    FoldState().save(path, method=tensors)
    read = {name.removeprefix("method."): value for name, value in read_safetensors(path).items()}
    rest = {name: value for name, value in state.items() if name not in tensors}
    assert all(isinstance(value, str | int) for value in rest.values())
    return {**rest, **read}


@every
def test_g8_a_run_resumed_in_the_middle_is_bit_equal(method: GGPO | MGPO, tmp_path: Path) -> None:
    whole = adapted()
    optimizer = whole.adamw()
    schedule = whole.schedule(method)
    schedule.begin(optimizer, 6)
    losses = train(whole, schedule, optimizer, range(1, 4))
    state = through_a_file(schedule.state_dict(), tmp_path / "state.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    kept = [factor.detach().clone() for factor in whole.factors]
    losses = train(whole, schedule, optimizer, range(4, 7))

    resumed = adapted()
    before = weights_fingerprint(resumed.model)
    for factor, value in zip(resumed.factors, kept, strict=True):
        factor.data.copy_(value)
    again = resumed.adamw()
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    schedule = resumed.schedule(method)
    schedule.load_state_dict(state)
    schedule.begin(again, 6)
    for mine, its in zip(train(resumed, schedule, again, range(4, 7)), losses, strict=True):
        assert torch.equal(mine, its)
    for mine, its in zip(resumed.factors, whole.factors, strict=True):
        assert torch.equal(mine, its)
    schedule.close()
    assert weights_fingerprint(resumed.model) == before


def test_forgetting_the_state_would_be_seen(tmp_path: Path) -> None:
    for method in (METHODS[0], METHODS[2]):
        one = adapted()
        optimizer = one.adamw()
        schedule = one.schedule(method)
        schedule.begin(optimizer, 6)
        train(one, schedule, optimizer, range(1, 4))
        other = one.schedule(method)
        other.begin(optimizer, 6)
        for found in (schedule, other):
            found.before_step(4)
        sizes = [
            [getattr(by, "std", None) if isinstance(method, GGPO) else by.left for by in one.perturbations.values()]  # type: ignore[union-attr]
            for one in (schedule, other)
        ]
        assert any(not torch.equal(a, b) for a, b in zip(*sizes, strict=True))


def test_the_state_is_a_copy_and_holds_one_entry_a_layer() -> None:
    one = adapted()
    optimizer = one.adamw()
    schedule = one.schedule(MGPO(own_momentum="always"))
    schedule.begin(optimizer, 6)
    train(one, schedule, optimizer, [1])
    state = schedule.state_dict()
    kept = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    assert len(kept) == 3 * len(one.layers)
    assert len({value.data_ptr() for value in kept.values()}) == len(kept)
    train(one, schedule, optimizer, [2])
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert (state["method"], state["step"]) == ("mgpo", 1)


def taught(method: GGPO | MGPO, optimizer: Optimizer | None = None, **options: Any) -> tuple[Adapted, dict[str, Any]]:
    one = adapted(**options)
    made = one.adamw() if optimizer is None else optimizer
    schedule = one.schedule(method)
    schedule.begin(made, 6)
    train(one, schedule, made, [1, 2])
    return one, schedule.state_dict()


def fresh(method: GGPO | MGPO, **options: Any) -> PerturbationSchedule:
    return adapted(**options).schedule(method)


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("method", "entry"),
    [
        (GGPO(), f"gradient_squares.{LAYER}"),
        (MGPO(), f"gradient_norm.{LAYER}"),
        (MGPO(own_momentum="always"), f"momentum_B.{LAYER}"),
    ],
)
def test_a_missing_misshapen_or_foreign_part_is_named(method: GGPO | MGPO, entry: str) -> None:
    _, state = taught(method)
    without = {name: value for name, value in state.items() if name != entry}
    with pytest.raises(CheckpointError, match=f"{entry} is missing"):
        fresh(method).load_state_dict(without)
    with pytest.raises(CheckpointError, match=rf"{entry} has the shape \[2, 2\] instead of"):
        fresh(method).load_state_dict({**state, entry: torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"gradient_squares\.lm_head belongs to no layer"):
        fresh(method).load_state_dict({**state, "gradient_squares.lm_head": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="step is missing"):
        fresh(method).load_state_dict({name: value for name, value in state.items() if name != "step"})


def test_another_plans_state_is_refused_with_its_layers() -> None:
    _, state = taught(GGPO(), targets=["q_proj", "k_proj"])
    with pytest.raises(CheckpointError) as caught:
        fresh(GGPO(), targets=["q_proj", "up_proj"]).load_state_dict(state)
    assert "gradient_squares.model.layers.0.mlp.up_proj is missing" in str(caught.value)
    assert "gradient_squares.model.layers.0.self_attn.k_proj belongs to no layer" in str(caught.value)
    _, state = taught(MGPO(own_momentum="always"), rank=2)
    with pytest.raises(CheckpointError, match=r"momentum_A\.model.* has the shape \[2, 32\] instead of \[3, 32\]"):
        fresh(MGPO(own_momentum="always"), rank=3).load_state_dict(state)


@pytest.mark.parametrize(("method", "other"), [(GGPO(), MGPO()), (MGPO(), GGPO())])
def test_the_other_methods_state_is_refused(method: GGPO | MGPO, other: GGPO | MGPO) -> None:
    _, state = taught(other)
    with pytest.raises(CheckpointError, match=f"is of '{other.id}', the run is {method.id}"):
        fresh(method).load_state_dict(state)
    with pytest.raises(CheckpointError, match="is of None"):
        fresh(method).load_state_dict({})


def test_many_faults_are_counted() -> None:
    with pytest.raises(CheckpointError, match=r"\(and 1 more\)"):
        fresh(GGPO()).load_state_dict({"method": "ggpo"})


def test_our_own_momentum_is_dropped_where_the_optimizer_has_one() -> None:
    one = adapted()
    _, state = taught(MGPO(own_momentum="always"))
    schedule = one.schedule(MGPO())
    schedule.load_state_dict(state)
    schedule.begin(one.adamw(), 6)
    assert not any(name.startswith("momentum_") for name in schedule.state_dict())
    schedule = one.schedule(MGPO())
    schedule.load_state_dict(state)
    schedule.begin(SGD(one.factors, lr=1e-2), 6)
    name = f"momentum_A.{LAYER}"
    assert torch.equal(schedule.state_dict()[name], state[name])


def test_figures_go_to_the_log_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    one = adapted()
    optimizer = one.adamw()
    schedule = one.schedule(GGPO())
    schedule.begin(optimizer, 6)
    with caplog.at_level(logging.INFO, logger="rankwise"):
        train(one, schedule, optimizer, range(1, 6))
        schedule.end(5)
    told = [record.message for record in caplog.records]
    assert [message.split(":")[0] for message in told] == ["step 2", "step 5"]
    assert all("ggpo_gradient_share" in message and "ggpo_noise 0.03" in message for message in told)


def test_closing_between_steps_or_within_one_takes_everything_off() -> None:
    for within in (False, True):
        for method in (GGPO(), MGPO()):
            one = adapted()
            optimizer = one.adamw()
            schedule = one.schedule(method)
            schedule.begin(optimizer, 6)
            train(one, schedule, optimizer, [1])
            if within:
                schedule.before_step(2)
            schedule.close()
            assert not schedule.perturbations
            for module in one.model.modules():
                assert "forward" not in module.__dict__
                assert not module._forward_hooks
                assert not module._forward_pre_hooks
