"""LoRA-Pro keeps what its specification promises (lora_pro.md section 6); golden cases are in tests/golden."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankwise.errors import ConfigError
from rankwise.methods.lora_pro import LoRAPro, LoRAProOptimizer
from rankwise.methods.recipe import method_from_id
from rankwise.ranks.shapes import LayerShape
from tests.methods.reference_pairs import ProPair, adjusted, closed_form, equivalent_gradient, one_sided
from tests.optimizers.support import (
    Pair,
    assert_same_bits,
    copied,
    dense_gradients,
    factors,
    group_of,
    make,
    new_pair,
    one_step,
    random,
    relative,
    transformed,
    walk,
    with_condition,
)

X_MODES = ("zero", "sylvester", "symmetry")
few = settings(max_examples=12)
sizes = st.tuples(st.integers(6, 16), st.integers(6, 16), st.integers(1, 4))
seeds = st.integers(0, 2**16)
scalings = st.sampled_from([0.5, 1.0, 2.0, 16 / math.sqrt(8)])


def problem(shape: tuple[int, int, int], seed: int, scaling: float = 2.0) -> tuple[Pair, Tensor]:
    return new_pair(shape, seed=seed, scaling=scaling), random(shape[0], shape[1], seed=3000 + seed)


def direction(pair: Pair, G: Tensor, x_mode: str) -> tuple[Tensor, Tensor]:
    """HA and hB of the product, read from one step of SGD; the usual delta would show at factors of little rank."""
    return one_step("pro-sgd", pair, G, x_mode=x_mode, delta=1e-13)


def least_residual(pair: Pair, G: Tensor) -> float:
    """The least ||s (B hA + hB A) - G|| over all (hA, hB), by dense least squares over every entry of both."""
    A, B, s = pair.A.detach(), pair.B.detach(), pair.scaling
    (rank, in_features), out_features = A.shape, B.shape[0]
    columns = []
    for row in range(rank):
        for column in range(in_features):
            moved = torch.zeros(out_features, in_features, dtype=A.dtype)
            moved[:, column] = s * B[:, row]
            columns.append(moved.flatten())
    for row in range(out_features):
        for column in range(rank):
            moved = torch.zeros(out_features, in_features, dtype=A.dtype)
            moved[row] = s * A[column]
            columns.append(moved.flatten())
    system = torch.stack(columns, dim=1)
    solution = torch.linalg.lstsq(system, G.flatten()[:, None], driver="gelsd").solution
    return (system @ solution - G.flatten()[:, None]).norm().item()


def residual(pair: Pair, G: Tensor, hA: Tensor, hB: Tensor) -> float:
    return (equivalent_gradient(pair.A.detach(), pair.B.detach(), hA, hB, pair.scaling) - G).norm().item()


# 1 and 2: the step's gradient is the closest that a low-rank step can have.


@few
@given(sizes, seeds, scalings, st.sampled_from(X_MODES))
def test_no_step_of_the_factors_is_closer_to_the_full_gradient(shape, seed, scaling, x_mode) -> None:
    pair, G = problem(shape, seed, scaling)
    hA, hB = direction(pair, G, x_mode)
    found = residual(pair, G, hA, hB)
    assert found == pytest.approx(least_residual(pair, G), rel=1e-6)
    for number in range(8):
        size = 10.0 ** -(number % 4)
        shifted = hA + size * random(*hA.shape, seed=number), hB + size * random(*hB.shape, seed=50 + number)
        assert residual(pair, G, *shifted) >= found * (1 - 1e-9)


@few
@given(sizes, seeds, st.sampled_from(X_MODES))
def test_the_equivalent_gradient_is_the_projection_on_the_tangent_space_whatever_the_scaling(
    shape, seed, x_mode
) -> None:
    pair, G = problem(shape, seed)
    A, B = pair.A.detach(), pair.B.detach()
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    projected = P_B @ G + G @ P_A - P_B @ G @ P_A
    for scaling in (0.5, 1.0, 2.0, 16 / math.sqrt(8)):
        scaled = Pair(pair.A, pair.B, scaling)
        assert relative(equivalent_gradient(A, B, *direction(scaled, G, x_mode), scaling), projected) <= 1e-6


# 3: descent.


@few
@given(sizes, seeds, scalings, st.sampled_from(X_MODES))
def test_the_loss_falls_by_the_squared_norm_of_the_equivalent_gradient(shape, seed, scaling, x_mode) -> None:
    pair, target = problem(shape, seed, scaling)

    def loss(one: Pair) -> float:
        return 0.5 * (one.product() - target).square().sum().item()

    G = pair.product() - target
    equivalent = equivalent_gradient(pair.A.detach(), pair.B.detach(), *direction(pair, G, x_mode), scaling)
    squared = equivalent.square().sum().item()
    assert (G * equivalent).sum().item() == pytest.approx(squared, rel=1e-6)
    (moved,) = copied([pair])
    walk(make("pro-sgd", [moved], lr=1e-6, x_mode=x_mode, delta=1e-13), [moved], [[G]])
    assert loss(pair) - loss(moved) == pytest.approx(1e-6 * squared, rel=1e-3)


# 4: which of the closest steps is taken.


def free_part(pair: Pair, G: Tensor, x_mode: str) -> Tensor:
    """X of hA = hA0 + X A, from the product's steps."""
    hA, _ = direction(pair, G, x_mode)
    hA0, _ = direction(pair, G, "zero")
    return (hA - hA0) @ torch.linalg.pinv(pair.A.detach())


@few
@given(sizes, seeds, scalings)
def test_sylvester_solves_its_equation_and_stays_closest_to_the_raw_gradients(shape, seed, scaling) -> None:
    pair, G = problem(shape, seed, scaling)
    A, B, s = pair.A.detach(), pair.B.detach(), scaling
    gA, gB = s * B.mT @ G, s * G @ A.mT
    X = free_part(pair, G, "sylvester")
    C = -torch.linalg.solve(B.mT @ B, gA @ A.mT) / s**2
    assert ((B.mT @ B @ X + X @ A @ A.mT - C).norm() / C.norm()).item() < 1e-6
    hA, hB = direction(pair, G, "sylvester")

    def distance(E: Tensor) -> float:
        return ((hA + E @ A - gA).square().sum() + (hB - B @ E - gB).square().sum()).item()

    least = distance(torch.zeros_like(X))
    for number in range(8):
        assert distance(10.0 ** -(number % 4) * random(*X.shape, seed=number)) >= least * (1 - 1e-9)


@few
@given(sizes, seeds, scalings)
def test_symmetry_lets_both_factors_do_the_same_share(shape, seed, scaling) -> None:
    pair, G = problem(shape, seed, scaling)
    A, B, s = pair.A.detach(), pair.B.detach(), scaling
    hA, hB = direction(pair, G, "symmetry")
    inverse_B, inverse_A = torch.linalg.inv(B.mT @ B), torch.linalg.inv(A @ A.mT)
    P_B, P_A = B @ inverse_B @ B.mT, A.mT @ inverse_A @ A
    identity = torch.eye(len(P_A), dtype=A.dtype)
    assert relative(hA, inverse_B @ (s * B.mT @ G) @ (identity - P_A / 2) / s**2) <= 1e-6
    identity = torch.eye(len(P_B), dtype=A.dtype)
    assert relative(hB, (identity - P_B / 2) @ (s * G @ A.mT) @ inverse_A / s**2) <= 1e-6

    def imbalance(E: Tensor) -> float:
        return (B @ (hA + E @ A) - (hB - B @ E) @ A).norm().item()

    least = imbalance(torch.zeros(len(A), len(A), dtype=A.dtype))
    for number in range(8):
        shift = 10.0 ** -(number % 4) * random(len(A), len(A), seed=number)
        assert imbalance(shift) >= least * (1 - 1e-9)


# 5: how far the product depends on the factorization.


def product_gap(kind: str, x_mode: str, lr: float) -> float:
    """max |difference| of the products after one step from (A, B) and from (R A, B R^-1), constant G."""
    pair, G = problem((10, 6, 2), 4)
    products = []
    for start in (pair, transformed(pair, with_condition(2, 9.0))):
        (moved,) = copied([start])
        walk(make(kind, [moved], lr=lr, x_mode=x_mode), [moved], [[G]])
        products.append(moved.product())
    return (products[1] - products[0]).abs().max().item()


@pytest.mark.parametrize("kind", ["pro-sgd", "pro-full"])
def test_without_x_the_product_does_not_depend_on_the_factorization(kind: str) -> None:
    assert product_gap(kind, "zero", 1e-2) < 1e-8


@pytest.mark.parametrize(("kind", "order"), [("pro-sgd", 2.0), ("pro-full", 2.0), ("pro-efficient", 1.0)])
def test_with_sylvester_it_does_to_second_order_and_in_efficient_mode_to_first(kind: str, order: float) -> None:
    gaps = [product_gap(kind, "sylvester", lr) for lr in (1e-2, 5e-3, 2.5e-3)]
    assert gaps[2] > 1e-8  # far above rounding and delta
    for wide, narrow in itertools.pairwise(gaps):
        assert math.log2(wide / narrow) == pytest.approx(order, abs=0.1)


# 6: factors without full rank.


def test_at_zero_B_only_B_moves_by_the_one_sided_step() -> None:
    pair, G = new_pair(zero_B=True), random(10, 6, seed=5)
    (moved,) = copied([pair])
    walk(make("pro-sgd", [moved], lr=0.1), [moved], [[G]])
    assert torch.equal(moved.A, pair.A)
    A, s = pair.A.detach(), pair.scaling
    assert relative(moved.B.detach(), -0.1 * (s * G @ A.mT) @ torch.linalg.inv(A @ A.mT) / s**2) <= 1e-6


@pytest.mark.parametrize("kind", ["pro-sgd", "pro-efficient", "pro-full"])
@pytest.mark.parametrize("x_mode", X_MODES)
def test_a_dead_index_stays_exactly_zero_and_leaves_the_rest_as_the_smaller_problem_has_it(kind, x_mode) -> None:
    pair = new_pair((9, 7, 3))
    with torch.no_grad():
        pair.A[1], pair.B[:, 1] = 0.0, 0.0
    kept = [0, 2]
    small = Pair(nn.Parameter(pair.A.detach()[kept].clone()), nn.Parameter(pair.B.detach()[:, kept].clone()), 2.0)
    gradients = dense_gradients([pair], 6)
    for one in (pair, small):
        walk(make(kind, [one], x_mode=x_mode), [one], gradients)
    assert not pair.A[1].any()
    assert not pair.B[:, 1].any()
    assert relative(pair.A.detach()[kept], small.A) <= 1e-12
    assert relative(pair.B.detach()[:, kept], small.B) <= 1e-12


@pytest.mark.parametrize("kind", ["pro-sgd", "pro-efficient", "pro-full"])
@pytest.mark.parametrize("x_mode", X_MODES)
def test_zero_factors_stay_zero_and_finite(kind: str, x_mode: str) -> None:
    pair = new_pair()
    with torch.no_grad():
        pair.A.zero_(), pair.B.zero_()
    walk(make(kind, [pair], x_mode=x_mode), [pair], dense_gradients([pair], 3))
    assert not pair.A.any()
    assert not pair.B.any()


@pytest.mark.parametrize("kind", ["pro-sgd", "pro-efficient", "pro-full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_rows_of_A_stay_finite(kind: str, dtype: torch.dtype) -> None:
    pair = new_pair((8, 9, 3), dtype=dtype)
    with torch.no_grad():
        pair.A[2] = pair.A[0]
    walk(make(kind, [pair], lr=1e-3), [pair], dense_gradients([pair], 20))
    assert all(factor.isfinite().all() for factor in factors([pair]))


@pytest.mark.parametrize("kind", ["pro-sgd", "pro-efficient", "pro-full"])
@pytest.mark.parametrize("shape", [(3, 8, 5), (8, 3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rank_above_a_dimension_stays_finite_and_bounded(kind, shape, dtype) -> None:
    pair = new_pair(shape, dtype=dtype)
    start = factors([pair])
    walk(make(kind, [pair], lr=1e-3), [pair], dense_gradients([pair], 20))
    for found, old in zip(factors([pair]), start, strict=True):
        assert found.isfinite().all()
        assert (found - old).abs().max() <= 1.0


def test_delta_rel_damps_the_first_steps_from_zero_B() -> None:
    relative_moves = []
    for delta_rel in (0.0, 1e-1):
        pair = new_pair(zero_B=True)
        start = pair.A.detach().clone()
        walk(make("pro-sgd", [pair], lr=1e-2, delta_rel=delta_rel), [pair], dense_gradients([pair], 30))
        relative_moves.append(((pair.A - start).norm() / start.norm()).item())
    assert relative_moves[1] < relative_moves[0]


# 7 and 8: the modes reduce to each other and to AdamW; decay.


@pytest.mark.parametrize("x_mode", X_MODES)
def test_full_without_memory_is_sgd_divided_by_a_large_eps(x_mode: str) -> None:
    pair, G = problem((10, 6, 2), 6)
    plain = one_step("pro-sgd", pair, G, lr=1e-2, x_mode=x_mode)
    full = one_step("pro-full", pair, G, lr=1e-2 * 1e8, x_mode=x_mode, betas=(0.0, 0.0), eps=1e8)
    for found, expected in zip(full, plain, strict=True):
        assert relative(found * 1e8, expected) <= 1e-6


@pytest.mark.parametrize("mode", ["efficient", "full"])
def test_plain_parameters_move_as_under_adamw(mode: str) -> None:
    own, other = (nn.Parameter(random(5, 3, seed=1)) for _ in range(2))
    pair = new_pair()
    optimizer = LoRAProOptimizer(
        [
            {"params": [pair.A, pair.B], "kind": "lora_pair", "scaling": [2.0]},
            {"params": [own], "kind": "plain", "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6},
        ],
        lr=1e-2,
        mode=mode,
    )
    adamw = torch.optim.AdamW([other], lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(20):
        own.grad = random(5, 3, seed=100 + step)
        other.grad = own.grad.clone()
        pair.give(random(10, 6, seed=200 + step))
        optimizer.step(), adamw.step()
    assert relative(own, other) <= 1e-12


def test_plain_parameters_of_sgd_mode_move_by_their_gradient() -> None:
    own, pair = nn.Parameter(random(5, seed=1)), new_pair()
    start = own.detach().clone()
    optimizer = LoRAProOptimizer(
        [
            {"params": [pair.A, pair.B], "kind": "lora_pair", "scaling": [2.0]},
            {"params": [own], "kind": "plain"},
        ],
        lr=1e-2,
        mode="sgd",
    )
    own.grad = random(5, seed=2)
    pair.give(random(10, 6, seed=3))
    optimizer.step()
    assert torch.equal(own.detach(), start - 1e-2 * random(5, seed=2))


@pytest.mark.parametrize(("kind", "power"), [("pro-full", 1), ("pro-efficient", 2)])
def test_weight_decay_alone_shrinks_the_product(kind: str, power: int) -> None:
    pair = new_pair()
    start = pair.product()
    walk(make(kind, [pair], lr=0.1, weight_decay=0.2), [pair], [[torch.zeros(10, 6, dtype=torch.float64)]] * 3)
    assert relative(pair.product(), (1 - 0.1 * 0.2) ** (3 * power) * start) <= 1e-15


def test_amsgrad_never_lets_the_second_moment_fall() -> None:
    shrinking = [[0.5**step * random(10, 6, seed=3)] for step in range(8)]
    moves = []
    for amsgrad in (False, True):
        pair = new_pair()
        walk(make("pro-full", [pair], amsgrad=amsgrad, betas=(0.0, 0.5)), [pair], shrinking)
        moves.append(relative(pair.product(), new_pair().product()))
    assert moves[1] < moves[0]


# The slow reference, and one frozen factor.


@pytest.mark.parametrize("mode", ["sgd", "efficient", "full"])
@pytest.mark.parametrize("x_mode", X_MODES)
@pytest.mark.parametrize("zero_B", [False, True])
def test_a_trajectory_equals_that_of_the_reference(mode: str, x_mode: str, zero_B: bool) -> None:
    pair = new_pair((9, 7, 3), zero_B=zero_B)
    settings: dict[str, Any] = {"lr": 5e-3, "x_mode": x_mode, "weight_decay": 0.1, "betas": (0.85, 0.99), "eps": 1e-7}
    if mode == "sgd":
        settings["weight_decay"] = 0.0
    reference = ProPair(pair.A.detach(), pair.B.detach(), pair.scaling, mode=mode, **settings)
    optimizer = make(f"pro-{mode}", [pair], **settings)
    for (G,) in dense_gradients([pair], 25, size=0.5):
        reference.step(pair.scaling * reference.B.mT @ G, pair.scaling * G @ reference.A.mT)
        walk(optimizer, [pair], [[G]])
    assert relative(pair.A, reference.A) <= 1e-7
    assert relative(pair.B, reference.B) <= 1e-7


@pytest.mark.parametrize("kind", ["pro-sgd", "pro-efficient", "pro-full"])
@pytest.mark.parametrize("frozen", ["A", "B"])
def test_with_one_factor_frozen_the_other_takes_the_one_sided_optimum(kind: str, frozen: str) -> None:
    pair, G = problem((10, 6, 2), 8)
    start_A, start_B = pair.A.detach().clone(), pair.B.detach().clone()
    gA, gB = pair.scaling * start_B.mT @ G, pair.scaling * G @ start_A.mT
    getattr(pair, frozen).requires_grad_(False)
    optimizer = make(kind, [pair], lr=1e-2)
    pair.A.grad, pair.B.grad = (None, gB) if frozen == "A" else (gA, None)
    optimizer.step()
    still, moved, start = (pair.A, pair.B, start_B) if frozen == "A" else (pair.B, pair.A, start_A)
    assert torch.equal(still.detach(), start_A if frozen == "A" else start_B)
    step = (start - moved.detach()) / 1e-2
    h = one_sided(start_A, start_B, *((None, gB) if frozen == "A" else (gA, None)), s=pair.scaling)
    if kind == "pro-sgd":
        assert relative(step, h) <= 1e-6
        reached = pair.scaling * (h @ start_A if frozen == "A" else start_B @ h)
        fixed, target = (start_A.mT, G.mT) if frozen == "A" else (start_B, G)
        best = fixed @ torch.linalg.lstsq(fixed, target).solution
        assert relative(reached, best.mT if frozen == "A" else best) <= 1e-6
    elif kind == "pro-efficient":
        assert relative(step, h / (h.abs() + 1e-8)) <= 1e-6
    else:
        assert (step * h).sum() > 0


def test_lora_plus_moves_B_faster_than_A() -> None:
    """LoRA+ is allowed: factors with their own learning rates keep their own directions."""
    pair, G = problem((10, 6, 2), 9)
    hA, hB = adjusted(
        pair.A.detach(),
        pair.B.detach(),
        pair.scaling * pair.B.detach().mT @ G,
        pair.scaling * G @ pair.A.detach().mT,
        pair.scaling,
    )
    (moved,) = copied([pair])
    group = {"params": [moved.A, moved.B], "kind": "lora_pair", "scaling": [2.0], "lr_ratio": 4.0}
    walk(LoRAProOptimizer([group], lr=1e-3, mode="sgd"), [moved], [[G]])
    assert relative(pair.A - moved.A, 1e-3 * hA) <= 1e-6
    assert relative(pair.B - moved.B, 4e-3 * hB) <= 1e-6


def test_the_reference_itself_reproduces_a_case_worked_by_hand() -> None:
    """Rank 1, in = out = 1, s = 1, A = 2, B = 3, G = 5: gA = 15, gB = 10, S_A = 4, S_B = 9.

    hA0 = 15 / 9, hB0 = 0; C = -(15 / 9) 2 = -10/3, X = C / 13 = -10/39; hA = 5/3 - 20/39 = 15/13, hB = 30/39 = 10/13:
    B hA + hB A = 45/13 + 20/13 = 5 = G.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    hA, hB = adjusted(2 * one, 3 * one, 15 * one, 10 * one, 1.0)
    assert hA.item() == pytest.approx(15 / 13, rel=1e-7)
    assert hB.item() == pytest.approx(10 / 13, rel=1e-7)
    pair = Pair(nn.Parameter(2 * one), nn.Parameter(3 * one), 1.0)
    found = direction(pair, 5 * one, "sylvester")
    assert [value.item() for value in found] == pytest.approx([15 / 13, 10 / 13], rel=1e-6)
    hA0, hB0 = closed_form(2 * one, 3 * one, 15 * one, 10 * one, 1.0, 1e-8)
    assert hA0.item() == pytest.approx(5 / 3, rel=1e-7)
    assert abs(hB0.item()) <= 1e-7


def test_a_second_optimizer_over_equal_pairs_takes_equal_steps() -> None:
    first = [new_pair((9, 7, 3))]
    second = copied(first)
    gradients = dense_gradients(first, 4)
    for pairs in (first, second):
        walk(make("pro-full", pairs), pairs, gradients)
    assert_same_bits(factors(first), factors(second))


# The method's settings.


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mode": "fast"}, r"mode.*'fast'.*efficient, full, sgd"),
        ({"mode": "efficent"}, r"mode.*did you mean 'efficient'"),
        ({"x_mode": "ones"}, r"x_mode.*sylvester, zero, symmetry"),
        ({"state_dtype": "float16"}, r"state_dtype.*float32, bfloat16"),
        ({"betas": (1.0, 0.999)}, r"betas.*\[0, 1\)"),
        ({"betas": (0.9,)}, r"betas"),
        ({"eps": -1e-8}, r"eps.*-1e-08"),
        ({"delta": 0.0}, r"delta"),
        ({"delta_rel": float("nan")}, r"delta_rel.*nan"),
        ({"amsgrad": True}, r"amsgrad.*full"),
        ({"amsgrad": 1, "mode": "full"}, r"amsgrad.*true or false"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_with_what_is_allowed(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora-pro\.{said}"):
        LoRAPro(**wrong)


@pytest.mark.parametrize(
    ("method", "kind", "same"),
    [
        (LoRAPro(), "pro-efficient", {}),
        (LoRAPro(mode="sgd", x_mode="zero", delta_rel=1e-4), "pro-sgd", {"x_mode": "zero", "delta_rel": 1e-4}),
        (
            LoRAPro(mode="full", amsgrad=True, betas=(0.8, 0.99), eps=1e-6, delta=1e-7),
            "pro-full",
            {"amsgrad": True, "betas": (0.8, 0.99), "eps": 1e-6, "delta": 1e-7},
        ),
        (
            LoRAPro(mode="full", state_dtype="bfloat16"),
            "pro-full",
            {"state_dtype": torch.bfloat16},
        ),
    ],
)
def test_the_method_builds_the_optimizer_with_its_settings(method: LoRAPro, kind: str, same: dict[str, Any]) -> None:
    pairs, others = [new_pair((9, 7, 3))], [new_pair((9, 7, 3))]
    gradients = dense_gradients(pairs, 5)
    walk(method.make_optimizer([group_of(pairs)], lr=1e-2), pairs, gradients)
    walk(make(kind, others, **same), others, gradients)
    assert_same_bits(factors(pairs), factors(others))


def test_the_presets_are_those_of_the_specification() -> None:
    official, paper = method_from_id("lora-pro", preset="official"), method_from_id("lora-pro", preset="paper")
    assert official == LoRAPro(mode="efficient", x_mode="sylvester", delta=1e-8)
    assert paper == LoRAPro(mode="full")
    assert LoRAPro.unclipped is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_mode_keeps_two_dense_moments_in_the_type_that_was_asked_for(dtype: torch.dtype) -> None:
    pair = new_pair((12, 9, 3), dtype=torch.float32)
    optimizer = make("pro-full", [pair], state_dtype=dtype)
    walk(optimizer, [pair], dense_gradients([pair], 3))
    dense = [value for value in optimizer.state[pair.B].values() if value.shape == (12, 9)]
    assert [value.dtype for value in dense] == [dtype, dtype]
    method = LoRAPro(mode="full", state_dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
    assert method.state_bytes({LayerShape("layer", 12, 9): 3}) == sum(value.nbytes for value in dense)
    assert LoRAPro().state_bytes({LayerShape("layer", 12, 9): 3}) is None


def test_bfloat16_moments_stay_near_float32_ones() -> None:
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        pair = new_pair((12, 9, 3), dtype=torch.float32)
        walk(make("pro-full", [pair], state_dtype=dtype), [pair], dense_gradients([pair], 12))
        moved.append(pair.product() - new_pair((12, 9, 3), dtype=torch.float32).product())
    assert 0.0 < relative(moved[1], moved[0]) <= 0.05
