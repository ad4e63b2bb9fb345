"""MGPO in training: the step along the momentum, where the momentum comes from, and what is refused."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from rankwise.adapters.perturbation import LowRank
from rankwise.errors import CheckpointError, ConfigError
from rankwise.methods.ggpo import GGPO, MGPO
from rankwise.methods.perturbing import PerturbationSchedule
from tests.methods.perturbed import BATCHES, Adapted, adapted, surrogate, train


def direction(one: Adapted, optimizer: Optimizer, name: str, key: str = "exp_avg") -> Tensor:
    """D = s (M_B A + B M_A), dense, float64."""
    layer = one.layers[name]
    M_A, M_B = (optimizer.state[factor][key].double() for factor in (layer.lora_A, layer.lora_B))
    return layer.scaling * (M_B @ layer.lora_A.detach().double() + layer.lora_B.detach().double() @ M_A)


def term(schedule: PerturbationSchedule, name: str) -> Tensor:
    """E, dense, float64."""
    by = schedule.perturbations[name]
    assert isinstance(by, LowRank)
    return by.left.double() @ by.right.double()


def begun(method: MGPO, optimizer: Callable[[Any], Optimizer] = lambda p: AdamW(p, lr=1e-2), **options: Any) -> Any:
    one = adapted(**options)
    made = optimizer(one.factors)
    schedule = one.schedule(method)
    schedule.begin(made, 20)
    return one, made, schedule


@pytest.mark.parametrize("sign", [-1, 1])
def test_g12_the_step_has_the_size_rho_over_gbar_and_the_sign_of_the_setting(sign: int) -> None:
    one, optimizer, schedule = begun(MGPO(rho=0.05, direction=sign, max_scale=1e6))  # type: ignore[arg-type]
    train(one, schedule, optimizer, [1, 2, 3])
    schedule.before_step(4)
    state = schedule.state_dict()
    for name in one.layers:
        D, E = direction(one, optimizer, name), term(schedule, name)
        size = 0.05 / float(state[f"gradient_norm.{name}"])
        assert float(E.norm()) == pytest.approx(size, rel=1e-5)
        torch.testing.assert_close(E, sign * size * D / D.norm(), rtol=1e-4, atol=1e-6 * size)
        assert sign * float((E * D).sum()) > 0


def test_g12_the_size_is_capped_at_max_scale() -> None:
    one, optimizer, schedule = begun(MGPO(rho=0.05, max_scale=2.0))
    train(one, schedule, optimizer, [1, 2], max_norm=1e-3)
    schedule.before_step(3)
    for name in one.layers:
        assert float(term(schedule, name).norm()) == pytest.approx(0.1, rel=1e-5)
    figures = schedule.figures()
    assert figures["mgpo_at_max_scale"] == figures["mgpo_perturbed"] == 1
    assert figures["mgpo_perturbation"] == pytest.approx(0.1, rel=1e-5)


def test_the_first_step_is_plain_because_there_is_no_momentum() -> None:
    one, optimizer, schedule = begun(MGPO())
    schedule.before_step(1)
    assert not schedule.perturbations
    assert schedule.figures() == {}
    train(one, schedule, optimizer, [1])
    schedule.before_step(2)
    assert set(schedule.perturbations) == set(one.layers)


def test_gbar_is_the_running_mean_of_the_clipped_gradients_norm_once_a_step() -> None:
    one, optimizer, schedule = begun(MGPO(norm_decay=0.8))
    mean: dict[str, float] = {}
    for step in (1, 2, 3):
        schedule.before_step(step)
        for _ in range(2):
            (one.model(**BATCHES[step]).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(one.factors, 0.05)
        for name, layer in one.layers.items():
            norm = float(surrogate(layer).norm())
            mean[name] = 0.8 * mean[name] + 0.2 * norm if name in mean else norm
        schedule.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_step(step)
        state = schedule.state_dict()
        for name, value in mean.items():
            assert float(state[f"gradient_norm.{name}"]) == pytest.approx(value, rel=1e-5)
    assert schedule.figures()["mgpo_gradient_norm"] > 0


@pytest.mark.parametrize(
    ("optimizer", "key"),
    [
        (lambda p: Adam(p, lr=1e-3), "exp_avg"),
        (lambda p: AdamW(p, lr=1e-3, fused=True), "exp_avg"),
        (lambda p: AdamW(p, lr=1e-3, foreach=True, amsgrad=True), "exp_avg"),
        (lambda p: NAdam(p, lr=1e-3), "exp_avg"),
        (lambda p: RAdam(p, lr=1e-3), "exp_avg"),
        (lambda p: Adamax(p, lr=1e-3), "exp_avg"),
        (lambda p: SGD(p, lr=1e-2, momentum=0.9), "momentum_buffer"),
    ],
)
def test_the_momentum_is_the_optimizers_where_it_has_one(
    optimizer: Callable[[Any], Optimizer], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        one, made, schedule = begun(MGPO(own_momentum="never"), optimizer)
    assert not caplog.records
    train(one, schedule, made, [1, 2])
    schedule.before_step(3)
    for name in one.layers:
        D, E = direction(one, made, name, key), term(schedule, name)
        assert float((E * D).sum() / (E.norm() * D.norm())) == pytest.approx(-1, rel=1e-6)
    assert not any(key.startswith("momentum_") for key in schedule.state_dict())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: SGD(p, lr=1e-2),
        lambda p: RMSprop(p, lr=1e-3, momentum=0.9),  # of normalized gradients
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
    ],
)
def test_another_optimizer_gets_a_momentum_of_our_own_and_the_log_says_so(
    optimizer: Callable[[Any], Optimizer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        one, made, schedule = begun(MGPO(mu=0.7), optimizer)
    assert f"momentum of our own, decay 0.7, stands in for one of {type(made).__name__}" in caplog.text
    train(one, schedule, made, [1, 2])
    schedule.before_step(3)
    assert set(schedule.perturbations) == set(one.layers)
    with pytest.raises(ConfigError, match=rf"own_momentum: never, and {type(made).__name__} keeps no momentum"):
        one.schedule(MGPO(own_momentum="never")).begin(made, 10)


def test_our_own_momentum_is_adams() -> None:
    one, optimizer, schedule = begun(MGPO(own_momentum="always", mu=0.9))
    train(one, schedule, optimizer, [1, 2, 3])
    state = schedule.state_dict()
    for name, layer in one.layers.items():
        for side, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
            kept = state[f"momentum_{side}.{name}"]
            assert kept.dtype == torch.float32
            torch.testing.assert_close(kept, optimizer.state[factor]["exp_avg"], rtol=1e-5, atol=1e-9)


def test_a_frozen_factor_has_a_momentum_of_zero() -> None:
    one = adapted(spread=0.1)
    for layer in one.layers.values():
        layer.lora_A.requires_grad_(False)
    trained = [layer.lora_B for layer in one.layers.values()]
    optimizer = AdamW(trained, lr=1e-2)
    schedule = one.schedule(MGPO())
    schedule.begin(optimizer, 9)
    for step in (1, 2):
        schedule.before_step(step)
        one.model(**BATCHES[step]).loss.backward()
        schedule.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
    schedule.before_step(3)
    name, layer = next(iter(one.layers.items()))
    D = layer.scaling * optimizer.state[layer.lora_B]["exp_avg"].double() @ layer.lora_A.double()
    E = term(schedule, name)
    assert float((E * D).sum() / (E.norm() * D.norm())) == pytest.approx(-1, rel=1e-6)


def test_a_momentum_that_is_not_finite_leaves_its_layer_plain_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    one, optimizer, schedule = begun(MGPO())
    train(one, schedule, optimizer, [1])
    name, layer = next(iter(one.layers.items()))
    optimizer.state[layer.lora_A]["exp_avg"][0, 0] = math.nan
    schedule.before_step(2)
    assert not term(schedule, name).any()
    assert all(term(schedule, other).any() for other in one.layers if other != name)
    loss = one.model(**BATCHES[0]).loss
    loss.backward()
    assert all(bool(factor.grad.isfinite().all()) for factor in one.factors)  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING):
        schedule.after_step(2)
        schedule.after_step(10)
    assert [record.message.split(":")[0] for record in caplog.records] == ["mgpo"]
    assert "NaN or infinite" in caplog.text


def test_a_vanishing_direction_is_no_perturbation() -> None:
    one, optimizer, schedule = begun(MGPO())
    train(one, schedule, optimizer, [1])
    name, layer = next(iter(one.layers.items()))
    for factor in (layer.lora_A, layer.lora_B):
        optimizer.state[factor]["exp_avg"].zero_()
    schedule.before_step(2)
    assert not term(schedule, name).any()
    assert schedule.figures()["mgpo_perturbed"] == pytest.approx(1 - 1 / len(one.layers))


# --- engines and optimizers that do not fit ---------------------------------------------------------------------------


class DeepSpeedZeroOptimizer(AdamW):
    """What DeepSpeed puts in the place of the optimizer."""


DeepSpeedZeroOptimizer.__module__ = "deepspeed.runtime.zero.stage_1_and_2"


@pytest.mark.parametrize("method", [GGPO(), MGPO()])
def test_deepspeed_and_flattened_factors_are_refused_before_the_first_step(method: GGPO | MGPO) -> None:
    one = adapted()
    schedule = one.schedule(method)
    with pytest.raises(ConfigError, match=rf"{method.id} reads .* DeepSpeed \(DeepSpeedZeroOptimizer\).* DDP or FSDP2"):
        schedule.begin(DeepSpeedZeroOptimizer(one.factors), 10)
    name, layer = next(iter(one.layers.items()))
    module: Any = layer.module
    module.lora_A["default"].weight = torch.nn.Parameter(layer.lora_A.detach().flatten())
    with pytest.raises(ConfigError, match=rf"{name}: lora_A is \[96\] and lora_B \[32, 3\].*FSDP1"):
        schedule.begin(one.adamw(), 10)


@pytest.mark.parametrize("method", [GGPO(), MGPO()])
def test_over_a_pair_optimizer_it_keeps_its_own_momentum(method: GGPO | MGPO, caplog: pytest.LogCaptureFixture) -> None:
    from rankwise.methods.lora_rite import LoRARITEOptimizer

    one = adapted()
    pairs = [factor for layer in one.layers.values() for factor in (layer.lora_A, layer.lora_B)]
    scaling = [layer.scaling for layer in one.layers.values()]
    optimizer = LoRARITEOptimizer([{"params": pairs, "kind": "lora_pair", "scaling": scaling}], lr=1e-3)
    schedule = one.schedule(method)
    with caplog.at_level(logging.INFO):
        schedule.begin(optimizer, 6)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]  # the recipe says it
    assert ("momentum of our own" in caplog.text) == (method.id == "mgpo")
    losses = train(one, schedule, optimizer, range(1, 4))
    assert all(loss.isfinite() for loss in losses)


def test_a_resumed_run_without_the_momentum_it_needs_is_refused() -> None:
    one, _, schedule = begun(MGPO())
    optimizer = one.adamw()
    train(one, schedule, optimizer, [1, 2])
    other = adapted()
    again = other.schedule(MGPO())
    again.load_state_dict(schedule.state_dict())
    with pytest.raises(CheckpointError, match="momentum of its own beside SGD, and the state after step 2 has none"):
        again.begin(SGD(other.factors, lr=1e-2), 10)
