"""GGPO and MGPO on paper: settings, presets and the equations, by hand and against dense float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import ConfigError
from rankwise.linalg.gram import gram_norm, gram_row_squares
from rankwise.methods.base import Budget
from rankwise.methods.ggpo import (
    GGPO,
    MGPO,
    cosine_ramp,
    momentum_factor,
    noise_std,
    running_mean,
    surrogate_gradient,
)
from tests.methods.perturbed import faults_of

BUDGET = Budget(r=8, lora_alpha=16, parameters=1000)
NAN, INF = float("nan"), float("inf")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_and_presets_are_those_of_the_specification() -> None:
    assert GGPO() == GGPO(sigma=0.03, beta=0.01, norm_ema=0.0, ramp="none", noise_scope="shared")
    assert MGPO() == MGPO(rho=0.05, norm_decay=0.9, max_scale=10.0, direction=-1, own_momentum="auto", mu=0.9)
    flat = GGPO(**GGPO.presets["flat-lora"])  # type: ignore[arg-type]
    assert (flat.sigma, flat.beta, flat.ramp) == (0.05, 0.0, "cosine")
    nlu, nlg = (MGPO(**MGPO.presets[name]) for name in ("mgpo-nlu", "mgpo-nlg"))  # type: ignore[arg-type]
    assert (nlu.rho, nlu.norm_decay, nlu.mu) == (0.05, 0.9, 0.9)
    assert (nlg.rho, nlg.norm_decay, nlg.mu) == (0.01, 0.8, 0.8)
    assert (GGPO.source, MGPO.source) == ("arXiv:2502.14538v1", "arXiv:2502.14538v2")


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (GGPO, {"sigma": -0.1}),
        (GGPO, {"sigma": NAN}),
        (GGPO, {"sigma": "0.03"}),
        (GGPO, {"beta": INF}),
        (GGPO, {"beta": True}),
        (GGPO, {"norm_ema": 1.0}),
        (GGPO, {"norm_ema": -0.1}),
        (GGPO, {"ramp": "linear"}),
        (GGPO, {"noise_scope": "node"}),
        (MGPO, {"rho": -1}),
        (MGPO, {"norm_decay": 1}),
        (MGPO, {"mu": 1.5}),
        (MGPO, {"max_scale": 0}),
        (MGPO, {"max_scale": INF}),
        (MGPO, {"direction": 0}),
        (MGPO, {"own_momentum": True}),
    ],
)
def test_a_value_that_makes_no_sense_is_named(kind: type, wrong: dict[str, object]) -> None:
    faults = faults_of(kind, **wrong)
    assert len(faults) == 1
    assert faults[0].startswith(f"{kind.id}.{next(iter(wrong))}: ")


def test_every_fault_is_told_at_once() -> None:
    assert len(faults_of(GGPO, sigma=-1, beta=NAN, norm_ema=2, ramp="cosinus", noise_scope="")) == 5
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        GGPO(ramp="cosin")  # type: ignore[arg-type]


def test_notes_tell_the_cost_the_trainers_beta1_and_a_sigma_that_drowns_the_weights() -> None:
    assert any("takes about" in note and "4-bit" in note for note in GGPO().notes({}, BUDGET))
    assert not any("warning" in note for note in GGPO(sigma=0.2).notes({}, BUDGET))
    assert any("warning: sigma 0.25" in note for note in GGPO(sigma=0.25).notes({}, BUDGET))
    assert GGPO(sigma=0).notes({}, BUDGET) == ("ggpo: sigma is 0, so this is plain LoRA",)
    told = MGPO(mu=0.8).notes({}, BUDGET)
    assert any("takes about" in note for note in told)
    assert any("beta1 = mu (0.8 here)" in note and "adam_beta1" in note for note in told)
    assert MGPO(rho=0).notes({}, BUDGET) == ("mgpo: rho is 0, so this is plain LoRA",)


# --- equations --------------------------------------------------------------------------------------------------------


def test_a_row_of_noise_by_hand() -> None:
    # W' = [3, 4] and G^ = [10, 0]: sqrt((25 + 0.01 * 100) / 2) = sqrt(13), times sigma 0.5.
    found = noise_std(torch.tensor([25.0]), torch.tensor([100.0]), sigma=0.5, beta=0.01, in_features=2)
    torch.testing.assert_close(found, torch.tensor([0.5 * math.sqrt(13)]))


def test_a_step_along_the_momentum_by_hand() -> None:
    # |D| = 2, gbar = 0.5: E = -0.05 / 2 * 2 D = -0.05 D. At gbar = 0.01 the scale is capped at 10, not 100.
    found = momentum_factor(torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.01]), rho=0.05, max_scale=10, direction=-1)
    torch.testing.assert_close(found, torch.tensor([-0.05, -0.25]))
    up = momentum_factor(torch.tensor([2.0]), torch.tensor([0.5]), rho=0.05, max_scale=10, direction=1)
    torch.testing.assert_close(up, torch.tensor([0.05]))


def test_no_step_without_a_direction_or_a_mean_norm() -> None:
    norm = torch.tensor([1e-12, 0.0, NAN, INF, 1.0, 1.0])
    gbar = torch.tensor([1.0, 1.0, 1.0, 1.0, NAN, 1.0])
    found = momentum_factor(norm, gbar, rho=0.05, max_scale=10, direction=-1)
    assert found[:5].tolist() == [0.0] * 5
    assert found[5] < 0


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 8), st.integers(1, 8), st.floats(0.05, 4))
def test_g4_the_surrogate_without_the_dense_product(seed: int, r: int, m: int, n: int, scaling: float) -> None:
    A, B = random(2, r, n, seed=seed), random(2, m, r, seed=seed + 1)
    dA, dB = random(2, r, n, seed=seed + 2), random(2, m, r, seed=seed + 3)
    dense = scaling * (dB @ A + B @ dA)
    left, right = surrogate_gradient(A, B, dA, dB)
    torch.testing.assert_close(scaling * left @ right, dense)
    torch.testing.assert_close(scaling**2 * gram_row_squares(left, right), dense.square().sum(-1))
    torch.testing.assert_close(scaling * gram_norm(left, right), torch.linalg.matrix_norm(dense), rtol=1e-6, atol=1e-7)


def test_at_zero_lora_b_the_surrogate_is_the_part_of_lora_a_alone() -> None:
    A, dA, dB = random(2, 5, seed=0), random(2, 5, seed=1), random(4, 2, seed=2)
    left, right = surrogate_gradient(A, torch.zeros(4, 2, dtype=torch.float64), dA, dB)
    torch.testing.assert_close(left @ right, dB @ A)


def test_a_running_mean_starts_at_its_first_value_and_passes_over_what_is_not_finite() -> None:
    old = torch.tensor([NAN, NAN, 2.0, 2.0, 2.0])
    new = torch.tensor([3.0, INF, 4.0, NAN, 0.0])
    found = running_mean(old, new, 0.9)
    assert found[0] == 3
    assert found[1].isnan()
    torch.testing.assert_close(found[2:], torch.tensor([2.2, 2.0, 1.8]))


def test_a_layer_with_one_bad_row_keeps_all_its_rows() -> None:
    found = running_mean(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[5.0, NAN], [5.0, 5.0]]), 0.0)
    assert found.tolist() == [[1.0, 1.0], [5.0, 5.0]]


def test_the_ramp_rises_from_zero_as_flat_loras_code_has_it() -> None:
    assert cosine_ramp(1, 100) == 0
    assert cosine_ramp(51, 100) == pytest.approx(0.5)
    assert cosine_ramp(26, 100) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert 0.99 < cosine_ramp(100, 100) < 1
    assert cosine_ramp(500, 100) == 1
    rises = [cosine_ramp(step, 30) for step in range(1, 32)]
    assert rises == sorted(rises)
