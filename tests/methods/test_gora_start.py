"""GoRA's start: the acceptance properties of gora.md section 6 that concern lora_A and lora_B."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.calibration.statistics import LayerStatistics
from rankwise.errors import CalibrationError, ConfigError
from rankwise.linalg.random import kaiming_uniform
from rankwise.methods.base import Factors, Start
from rankwise.methods.draws import draw_factor, singular_rows
from rankwise.methods.gora import GAMMA_CANDIDATES, GoRA, descent_direction, gain
from rankwise.ranks.shapes import LayerShape
from tests.methods.support import (
    Known,
    budget_of,
    known,
    projector,
    random,
    relative,
    several,
    start_of,
    statistics_of,
    update_of,
)

INITIALIZATIONS = ["kaiming", "default_normal", "normal", "orthogonal", "weight_svd", "grad_svd"]


def layer(out_features: int = 48, in_features: int = 64, seed: int = 0, scale: float = 1.0) -> Known:
    weight = random(out_features, in_features, seed=seed)
    return known(f"layers.{seed}", weight, scale * random(out_features, in_features, seed=seed + 100))


def direction(found: Known, lora_A: Tensor) -> Tensor:
    """B* from the products alone, the way calibration delivers them."""
    products = LayerStatistics(shape=found.shape, batches=1, projection=found.gradient @ lora_A.mT)
    return descent_direction(products, lora_A)


def to_bfloat16(factor: Tensor) -> Tensor:
    return factor.bfloat16().float()


def test_the_equations_on_a_case_worked_by_hand() -> None:
    # A = [2, 0] keeps the first column of G: G A^+ = G[:, 0] / 2; gain = 0.5 * sqrt(2 / 1) * 3 / 6
    gradient, lora_A = torch.tensor([[4.0, 7.0], [-6.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    found = known("one", torch.ones(2, 2), gradient)
    assert direction(found, lora_A).tolist() == [[-2.0], [3.0]]
    assert gain(0.5, 2, 1, 3.0, 6.0) == pytest.approx(0.25 * math.sqrt(2))


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 16), seed=st.integers(0, 1000), log_scale=st.integers(-6, 3))
def test_property_1_what_is_left_of_the_gradient_is_orthogonal_to_the_rows_of_a(
    rank: int, seed: int, log_scale: int
) -> None:
    found = layer(seed=seed, scale=10.0**log_scale)
    lora_A = kaiming_uniform(rank, 64, torch.Generator().manual_seed(seed))
    projected = -direction(found, lora_A) @ lora_A
    left = (found.gradient - projected).double() @ lora_A.double().mT
    assert left.abs().max() <= 1e-6 * found.gradient.norm() * lora_A.norm()
    again = -direction(replace(found, gradient=projected), lora_A) @ lora_A
    assert relative(again, projected) <= 1e-6


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 16), seed=st.integers(0, 1000), size=st.floats(1e-3, 10))
def test_property_2_no_other_b_comes_closer_to_the_gradient(rank: int, seed: int, size: float) -> None:
    found = layer(seed=seed)
    lora_A = kaiming_uniform(rank, 64, torch.Generator().manual_seed(seed))
    best = direction(found, lora_A).double()
    G, A = found.gradient.double(), lora_A.double()
    other = best + size * random(48, rank, seed=seed + 7).double()
    assert (G + best @ A).norm() <= (G + other @ A).norm()
    projected = -best @ A
    assert G.norm() ** 2 == pytest.approx((projected.norm() ** 2 + (G - projected).norm() ** 2).item(), rel=1e-5)


@pytest.mark.parametrize("lora_alpha", [8, 16, 32])
@pytest.mark.parametrize("rank_stabilized", [True, False])
@pytest.mark.parametrize("scaling", ["dynamic", "average"])
def test_property_3_the_update_is_the_same_for_every_alpha_and_scaling_rule(
    lora_alpha: int, rank_stabilized: bool, scaling: str
) -> None:
    found, rank, gamma = layer(), 6, 0.05
    method = GoRA(gamma=gamma, rank_stabilized=rank_stabilized, scaling=scaling)
    factors, multiplier = start_of(method, found, rank, lora_alpha=lora_alpha)
    expected = -gamma * math.sqrt(64 / rank) * found.gradient.double() @ projector(factors.lora_A)
    assert relative(update_of(factors, multiplier), expected) <= 1e-5


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_property_3_holds_for_every_start_of_lora_a(initialization: str) -> None:
    found, rank = layer(), 6
    factors, multiplier = start_of(GoRA(initialization=initialization), found, rank)
    expected = -0.05 * math.sqrt(64 / rank) * found.gradient.double() @ projector(factors.lora_A)
    assert relative(update_of(factors, multiplier), expected) <= 1e-5


def test_the_older_rule_divides_by_the_scale_rank_instead() -> None:
    found, rank = layer(), 6
    for method, divisor in (
        (GoRA(scale_by_lr=False), math.sqrt(6)),
        (GoRA(scale_by_lr=False, scaling="average", rank_stabilized=False), 8.0),
    ):
        factors, multiplier = start_of(method, found, rank)
        expected = -(0.02 / divisor) * found.gradient.double() @ projector(factors.lora_A)
        assert relative(update_of(factors, multiplier), expected) <= 1e-5


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 16), seed=st.integers(0, 1000))
def test_property_4_the_update_depends_on_the_row_space_of_a_only(rank: int, seed: int) -> None:
    found = layer(seed=seed)
    lora_A = kaiming_uniform(rank, 64, torch.Generator().manual_seed(seed))
    first, _ = torch.linalg.qr(random(rank, rank, seed=seed + 1))
    second, _ = torch.linalg.qr(random(rank, rank, seed=seed + 2))
    mixed = first @ torch.diag(torch.linspace(1, 10, rank)) @ second @ lora_A
    assert relative(direction(found, mixed) @ mixed, direction(found, lora_A) @ lora_A) <= 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_property_5_the_inner_product_with_the_gradient_is_negative(seed: int) -> None:
    found, rank = layer(seed=seed), 6
    factors, multiplier = start_of(GoRA(), found, rank)
    G = found.gradient.double()
    inner = (G * update_of(factors, multiplier)).sum().item()
    expected = -0.05 * math.sqrt(64 / rank) * (G @ projector(factors.lora_A)).norm().item() ** 2
    assert inner < 0
    assert inner == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_property_5_the_loss_changes_as_the_first_order_says(seed: int) -> None:
    """A smooth two-layer model in float64, both layers moved together, gamma 1e-4."""
    sizes = {"layers.0": (24, 16), "layers.1": (8, 24)}
    inputs, targets = (random(32, n, seed=seed + n, dtype=torch.float64) for n in (16, 8))
    weights = {n: (random(*size, seed=seed) / size[1] ** 0.5).double() for n, size in sizes.items()}

    def loss(moved: dict[str, Tensor]) -> Tensor:
        hidden = torch.tanh(inputs @ moved["layers.0"].mT)
        return (hidden @ moved["layers.1"].mT - targets).square().mean()

    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    gradients = dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))
    predicted, moved = 0.0, {}
    for name, weight in weights.items():
        factors, multiplier = start_of(GoRA(gamma=1e-4), known(name, weight.float(), gradients[name].float()), 4)
        update = update_of(factors, multiplier)
        predicted += (gradients[name] * update).sum().item()
        moved[name] = weight + update
    assert (loss(moved) - loss(weights)).item() == pytest.approx(predicted, rel=0.01)
    assert predicted < 0


def test_property_6_full_rank_is_gradient_descent() -> None:
    found = layer(out_features=40, in_features=24)
    factors, multiplier = start_of(GoRA(r_max=24), found, 24)
    assert relative(update_of(factors, multiplier), -0.05 * found.gradient) <= 1e-4


def test_property_6_rank_one_works() -> None:
    found = layer()
    factors, multiplier = start_of(GoRA(), found, 1)
    expected = -0.05 * 8 * found.gradient.double() @ projector(factors.lora_A)
    assert relative(update_of(factors, multiplier), expected) <= 1e-5


def test_property_6_the_update_has_about_the_norm_of_a_gradient_step() -> None:
    ratios = []
    for seed in range(20):
        found = layer(out_features=256, in_features=512, seed=seed)
        factors, multiplier = start_of(GoRA(), found, 8, seed=seed)
        ratios.append((update_of(factors, multiplier).norm() / (0.05 * found.gradient.norm())).item())
    assert 0.5 <= min(ratios) <= max(ratios) <= 1.5
    assert 0.9 <= sum(ratios) / len(ratios) <= 1.1


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize("zero", [{"gamma": 0.0}, {"scale_by_lr": False, "stable_gamma": 0.0}])
def test_property_7_no_step_is_a_zero_b(initialization: str, zero: dict[str, object]) -> None:
    factors, _ = start_of(GoRA(initialization=initialization, **zero), layer(), 6)
    assert factors.lora_A.any()
    assert not factors.lora_B.any()


def test_property_7_no_step_needs_no_statistics() -> None:
    found = layer()
    start = Start(
        layer=found.layer,
        rank=4,
        divisor=2.0,
        budget=budget_of([found.shape]),
        seed=0,
        dtype_cast=lambda factor: factor,
        statistics=None,
    )
    assert not GoRA(gamma=0.0).initialize(start).lora_B.any()
    for method in (GoRA(), GoRA(gamma=0.0, initialization="grad_svd")):
        with pytest.raises(CalibrationError, match=r"layers\.0.*there are none"):
            method.initialize(start)


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_property_13_a_layer_without_gradient_starts_with_zero_b_and_a_live_a(initialization: str) -> None:
    found = replace(layer(), gradient=torch.zeros(48, 64))
    factors, _ = start_of(GoRA(initialization=initialization), found, 6)
    assert not factors.lora_B.any()
    assert factors.lora_A.isfinite().all()
    assert (factors.lora_A.norm(dim=1) > 0).all()


def test_property_13_a_layer_that_no_batch_reached_starts_with_zero_b() -> None:
    found = layer()
    statistics = LayerStatistics(shape=found.shape, batches=0)
    start = Start(
        layer=found.layer,
        rank=4,
        divisor=2.0,
        budget=budget_of([found.shape]),
        seed=0,
        dtype_cast=lambda factor: factor,
        statistics=statistics,
    )
    assert not GoRA().initialize(start).lora_B.any()


def test_property_16_bfloat16_factors_lose_little_when_a_is_cast_before_b_is_solved() -> None:
    found = layer(out_features=512, in_features=512)
    factors, multiplier = start_of(GoRA(), found, 8, dtype_cast=to_bfloat16)
    assert torch.equal(factors.lora_A, to_bfloat16(factors.lora_A))
    stored = Factors(factors.lora_A, to_bfloat16(factors.lora_B))
    exact = -0.05 * math.sqrt(512 / 8) * found.gradient.double() @ projector(factors.lora_A)
    assert relative(update_of(stored, multiplier), exact) <= 2e-3
    late, _ = start_of(GoRA(), found, 8)  # solved against the uncast A, both cast afterwards
    cast_late = Factors(to_bfloat16(late.lora_A), to_bfloat16(late.lora_B))
    uncast = -0.05 * math.sqrt(512 / 8) * found.gradient.double() @ projector(late.lora_A)
    assert relative(update_of(stored, multiplier), exact) < relative(update_of(cast_late, multiplier), uncast)


@pytest.mark.parametrize("initialization", ["kaiming", "default_normal", "normal", "orthogonal"])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_projection_drawn_before_the_pass_serves_every_rank(initialization: str, rank: int) -> None:
    found, method = layer(), GoRA(initialization=initialization)
    rows = method.request([found.shape], budget_of([found.shape]), 3).projection
    assert rows is not None
    drawn = rows(found.shape)
    assert drawn.shape == (32, 64)
    factors, _ = start_of(method, found, rank, seed=3)
    assert torch.equal(factors.lora_A, drawn[:rank])


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 40), seed=st.integers(0, 100))
def test_fewer_rows_are_the_first_of_more(rows: int, columns: int, seed: int) -> None:
    for kind in ("kaiming", "default_normal", "normal"):
        fewer, more = (draw_factor(kind, n, columns, torch.Generator().manual_seed(seed)) for n in (rows, rows + 5))
        assert torch.equal(fewer, more[:rows])


def test_the_draws_have_the_distributions_they_name() -> None:
    def drawn(kind: str) -> Tensor:
        return draw_factor(kind, 64, 400, torch.Generator().manual_seed(0))

    assert drawn("kaiming").abs().max() <= 1 / 20
    assert drawn("kaiming").std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert drawn("default_normal").std().item() == pytest.approx(1 / 20, rel=0.02)
    assert drawn("normal").std().item() == pytest.approx(0.02, rel=0.02)
    orthogonal = drawn("orthogonal")
    assert torch.allclose(orthogonal @ orthogonal.mT, torch.eye(64), atol=1e-6)


def test_singular_rows_are_the_leading_right_vectors_times_their_values() -> None:
    matrix = random(40, 30, seed=5) @ torch.diag(0.7 ** torch.arange(30))
    rows = singular_rows(matrix, 3, torch.Generator().manual_seed(0))
    _, values, Vh = torch.linalg.svd(matrix)
    expected = values[:3, None] * Vh[:3]
    assert torch.allclose(rows @ rows.mT, torch.diag(values[:3] ** 2), atol=1e-3)
    assert torch.allclose((rows * expected).sum(dim=1).abs(), values[:3] ** 2, rtol=1e-4)


def test_an_svd_start_asks_for_the_gradient_and_the_others_for_the_projection_alone() -> None:
    shapes = [LayerShape("a", 8, 8)]
    for initialization in INITIALIZATIONS:
        request = GoRA(initialization=initialization).request(shapes, budget_of(shapes), 0)
        assert request.gradient is ("svd" in initialization)
        assert (request.projection is None) is request.gradient


def test_a_rank_above_what_was_calibrated_for_says_which_bound_to_raise() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0: rank 33 in the plan .* \(32, .* set gora\.r_max to 33"):
        start_of(GoRA(), layer(), 33)


@pytest.mark.parametrize("kept", ["projection", "gradient"])
def test_a_non_finite_gradient_names_the_layer(kept: str) -> None:
    found = layer()
    lora_A = kaiming_uniform(4, 64, torch.Generator().manual_seed(0))
    bad = found.gradient @ lora_A.mT if kept == "projection" else found.gradient.clone()
    bad[0, 0] = float("nan")
    statistics = LayerStatistics(shape=found.shape, batches=1, **{kept: bad})
    with pytest.raises(CalibrationError, match=r"layers\.0.*not finite"):
        descent_direction(statistics, lora_A)


def test_a_rank_above_the_inputs_is_refused() -> None:
    found = layer(out_features=20, in_features=8)
    with pytest.raises(ConfigError, match="rank 12 is above its 8 inputs"):
        direction(found, random(12, 8))


# --- adaptive gamma -----------------------------------------------------------------------------------------------


def test_the_candidates_are_the_52_powers_of_four_fifths_above_1e_5() -> None:
    assert len(GAMMA_CANDIDATES) == 52
    assert GAMMA_CANDIDATES[0] == 1.0
    assert GAMMA_CANDIDATES[-1] == pytest.approx(1.1418e-5, rel=1e-4)
    assert 0.8 * GAMMA_CANDIDATES[-1] < 1e-5


def searched(losses: dict[float, float], base: float, gamma: float = 0.05) -> tuple[float, int]:
    """The gamma that the search picks, and how many losses it asked for; losses by candidate, otherwise above base."""
    start = {"one": Factors(torch.ones(2, 3), torch.full((4, 2), gamma))}
    asked = []

    def evaluate(lora_B: dict[str, Tensor] | None) -> float:
        asked.append(lora_B)
        if lora_B is None:
            return base
        candidate = lora_B["one"][0, 0].item()
        return next((loss for key, loss in losses.items() if math.isclose(key, candidate, rel_tol=1e-5)), base + 1)

    refined = GoRA(adaptive_gamma=True, gamma=gamma).refine(start, evaluate)
    assert refined is not None
    assert torch.equal(refined["one"].lora_A, start["one"].lora_A)
    assert torch.equal(start["one"].lora_B, torch.full((4, 2), gamma))
    return refined["one"].lora_B[0, 0].item(), len(asked)


def test_the_search_takes_the_lowest_loss_of_53_forwards() -> None:
    chosen, forwards = searched({0.8**5: 2.9, 0.8**9: 2.5, 0.8**20: 2.7}, base=3.0)
    assert chosen == pytest.approx(0.8**9)
    assert forwards == 53


def test_the_search_does_not_depend_on_the_configured_gamma() -> None:
    assert searched({0.8**9: 2.5}, 3.0, gamma=0.7)[0] == pytest.approx(searched({0.8**9: 2.5}, 3.0)[0])


def test_ties_keep_the_larger_gamma() -> None:
    assert searched({0.8**12: 2.5, 0.8**4: 2.5}, base=3.0)[0] == pytest.approx(0.8**4)


def test_an_improvement_within_float_noise_is_none() -> None:
    assert searched({0.8**51: 3.0 - 1e-7}, base=3.0)[0] == 0.0
    assert searched({}, base=3.0)[0] == 0.0


def test_candidates_with_a_non_finite_loss_are_passed_over() -> None:
    losses = {1.0: float("inf"), 0.8: float("nan"), 0.8**2: 2.9}
    assert searched(losses, base=3.0)[0] == pytest.approx(0.8**2)


def test_a_non_finite_loss_of_the_base_model_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="without adapter is nan"):
        searched({}, base=float("nan"))


def test_without_the_option_nothing_is_evaluated() -> None:
    def fail(_: object) -> float:
        raise AssertionError("evaluated")

    assert GoRA().refine({}, fail) is None


def test_several_layers_draw_from_streams_of_their_own() -> None:
    layers = several([(16, 16), (16, 16)])
    budget = budget_of([found.shape for found in layers])
    first = statistics_of(GoRA(), layers, budget)
    second = statistics_of(GoRA(), layers[::-1], budget)
    for name, found in first.layers.items():
        assert found.projection is not None
        assert torch.equal(found.projection, second.layers[name].projection)
    a, b = (start_of(GoRA(), found, 4)[0].lora_A for found in layers)
    assert not torch.equal(a, b)
