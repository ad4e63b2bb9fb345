"""LoRA-RITE keeps what its specification promises (lora_rite.md section 6); golden cases are in tests/golden."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankwise.errors import ConfigError
from rankwise.methods.lora_rite import LoRARITE, LoRARITEOptimizer
from rankwise.methods.recipe import method_from_id
from tests.methods.reference_pairs import (
    Rite,
    RitePair,
    Side,
    cholesky_basis,
    debiased,
    eigen_basis,
    polar_basis,
    qr_basis,
    rms,
    svd_basis,
)
from tests.optimizers.support import (
    MIXED,
    Pair,
    assert_same_bits,
    copied,
    dense_gradients,
    factors,
    group_of,
    make,
    new_pair,
    new_pairs,
    one_step,
    random,
    relative,
    transformed,
    walk,
    with_condition,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"weight_decay": 0.05},
    "escape": {"apply_escape": True, "weight_decay": 0.05},
    "clip": {"clip_unmagnified_grad": 0.02, "weight_decay": 0.05},
    "skip": {"update_skipping": 0.1, "weight_decay": 0.05},
    "cap": {"update_capping": 0.5, "weight_decay": 0.05},
    "balance": {"balance_param": True, "weight_decay": 0.05},
}
OFF = {"clip_unmagnified_grad": 0.0, "update_skipping": 0.0}


def reference_of(pairs: Sequence[Pair], lr: float = 1e-2, basis: Any = svd_basis, **given_settings: Any) -> Rite:
    """The slow reference at the same start with the same settings."""
    names = {
        "clip_unmagnified_grad": "clip",
        "update_skipping": "skip",
        "update_capping": "cap",
        "apply_escape": "escape",
        "balance_param": "balance",
    }
    return Rite(
        [RitePair(pair.A.detach(), pair.B.detach()) for pair in pairs],
        lr=lr,
        basis=basis,
        **{names.get(key, key): value for key, value in given_settings.items()},
    )


def reference_step(rite: Rite, pairs: Sequence[Pair], G: Sequence[Tensor]) -> None:
    rite.step(
        [
            (pair.scaling * one.B.mT @ dense, pair.scaling * dense @ one.A.mT)
            for pair, one, dense in zip(pairs, rite.pairs, G, strict=True)
        ]
    )


def against_reference(pairs: Sequence[Pair], steps: int, *, size: float = 0.05, **given_settings: Any) -> float:
    """The largest relative gap of any factor over the steps."""
    rite, optimizer, worst = reference_of(pairs, **given_settings), make("rite", pairs, **given_settings), 0.0
    for G in dense_gradients(pairs, steps, size=size):
        reference_step(rite, pairs, G)
        walk(optimizer, pairs, [G])
        for pair, one in zip(pairs, rite.pairs, strict=True):
            worst = max(worst, relative(pair.A, one.A), relative(pair.B, one.B))
    return worst


# 1: the product does not depend on the factorization.


def invariance_gap(
    make_optimizer: Any, start: Pair, R: Tensor, *, steps: int = 15, size: float = 0.05
) -> tuple[float, Pair, Pair]:
    """The largest gap of the products over the steps, relative to the largest product, and both ends."""
    pairs = [*copied([start]), transformed(start, R)]
    gradients = dense_gradients([start], steps, size=size)
    optimizers = [make_optimizer([pair]) for pair in pairs]
    gap = largest = 0.0
    for G in gradients:
        for pair, optimizer in zip(pairs, optimizers, strict=True):
            walk(optimizer, [pair], [G])
        gap = max(gap, (pairs[0].product() - pairs[1].product()).abs().max().item())
        largest = max(largest, pairs[0].product().abs().max().item())
    return gap / largest, *pairs


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize(("condition", "limit"), [(41.0, 1e-12), (1e4, 1e-10), (1e6, 1e-8)])
def test_in_float64_the_product_is_the_same_from_every_factorization(variant, condition, limit) -> None:
    start = new_pair((10, 6, 2), scaling=1.0)
    gap, *_ = invariance_gap(
        lambda pairs: make("rite", pairs, **VARIANTS[variant]), start, with_condition(2, condition)
    )
    assert gap < limit


@pytest.mark.parametrize("shape", [(12, 16, 4), (16, 9, 3)])
@pytest.mark.parametrize(("condition", "limit"), [(41.0, 1e-12), (1e4, 1e-10), (1e6, 1e-8)])
def test_so_it_is_at_higher_ranks(shape, condition, limit) -> None:
    start = new_pair(shape, scaling=1.0)
    gap, *_ = invariance_gap(lambda pairs: make("rite", pairs), start, with_condition(shape[2], condition))
    assert gap < limit


@pytest.mark.parametrize("shape", [(10, 6, 2), (12, 16, 4)])
@pytest.mark.parametrize(("condition", "limit"), [(300.0, 1e-5), (1e4, 1e-2)])
@pytest.mark.parametrize("seed", range(3))
def test_in_float32_it_is_the_same_up_to_what_storing_the_factors_rounds_away(shape, condition, limit, seed) -> None:
    """A float64 step whose factors are stored in float32 exceeds the specification's first limit already."""
    start, R = (
        new_pair(shape, seed=seed, scaling=1.0, dtype=torch.float32),
        with_condition(shape[2], condition, seed=seed),
    )
    gap, *_ = invariance_gap(lambda pairs: make("rite", pairs), start, R)
    assert gap < max(limit, 3 * stored_gap(start, R))


def stored_gap(start: Pair, R: Tensor, steps: int = 15) -> float:
    """The gap of the float64 reference whose factors are rounded to float32 after each step, and nothing else is."""
    pairs = [start, transformed(start, R)]
    walks = [reference_of([pair]) for pair in pairs]
    gap = largest = 0.0
    for G in dense_gradients([start], steps):
        for pair, rite in zip(pairs, walks, strict=True):
            reference_step(rite, [pair], G)
            one = rite.pairs[0]
            one.A, one.B = one.A.float().double(), one.B.float().double()
        products = [rite.pairs[0].B @ rite.pairs[0].A for rite in walks]
        gap = max(gap, (products[0] - products[1]).abs().max().item())
        largest = max(largest, products[0].abs().max().item())
    return gap / largest


@pytest.mark.parametrize("seed", range(4))
def test_adamw_moves_another_product_from_another_factorization(seed: int) -> None:
    start = new_pair((10, 6, 2), seed=seed, scaling=1.0)
    gap, *_ = invariance_gap(
        lambda pairs: torch.optim.AdamW([pairs[0].A, pairs[0].B], lr=1e-2), start, with_condition(2, 41.0)
    )
    assert gap > 1e-2


def test_balancing_leaves_the_product_and_evens_the_norms() -> None:
    start = new_pair((10, 6, 2), scaling=1.0)
    with torch.no_grad():
        start.A.mul_(30.0)
    plain, balanced = copied([start]), copied([start])
    gradients = dense_gradients([start], 10)
    walk(make("rite", plain), plain, gradients)
    walk(make("rite", balanced, balance_param=True), balanced, gradients)
    assert relative(balanced[0].product(), plain[0].product()) <= 1e-12
    assert balanced[0].A.norm().item() == pytest.approx(balanced[0].B.norm().item(), rel=1e-5)


# 2 and 3: bases.


@pytest.mark.parametrize("basis", [svd_basis, qr_basis, cholesky_basis, eigen_basis, polar_basis])
@pytest.mark.parametrize("variant", ["decay", "escape"])
def test_the_trajectory_is_that_of_every_orthonormal_basis(basis, variant) -> None:
    pairs = new_pairs([(10, 6, 2), (8, 9, 4)])
    rite, optimizer = reference_of(pairs, basis=basis, **VARIANTS[variant]), make("rite", pairs, **VARIANTS[variant])
    for G in dense_gradients(pairs, 15):
        reference_step(rite, pairs, G)
        walk(optimizer, pairs, [G])
    for pair, one in zip(pairs, rite.pairs, strict=True):
        assert relative(pair.A, one.A) <= 1e-10
        assert relative(pair.B, one.B) <= 1e-10


@settings(max_examples=12)
@given(st.integers(6, 16), st.integers(1, 4), st.integers(0, 2**16))
def test_overlaps_shrink_and_transport_loses_second_moment(length: int, rank: int, seed: int) -> None:
    """What the algorithm rests on, in the reference that the product is held to."""
    new, old = (svd_basis(random(length, rank, seed=seed + k))[0] for k in (0, 1))
    assert (new.mT @ new - torch.eye(rank, dtype=torch.float64)).abs().max() < 1e-12
    P = new.mT @ old
    assert torch.linalg.matrix_norm(P, 2) <= 1 + 1e-12
    root = random(rank, rank, seed=seed + 2)
    side = Side(root @ root.mT, torch.zeros(rank, length, dtype=torch.float64))
    moved = side.transport(P, 0.9, escape=True)
    assert moved.trace() <= side.precond.trace() + 1e-12
    assert side.escape >= 0.0


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_the_kept_bases_are_orthonormal_overlaps_shrink_and_moments_stay_positive(condition: float) -> None:
    start = new_pair((12, 16, 4))
    (pair,) = pairs = [transformed(start, with_condition(4, condition))]
    optimizer = make("rite", pairs)
    bases: dict[str, list[Tensor]] = {"A": [], "B": []}
    for G in dense_gradients(pairs, 5):
        before = {"A": pair.A.detach().mT.clone(), "B": pair.B.detach().clone()}
        walk(optimizer, pairs, [G])
        for side, factor in (("A", pair.A), ("B", pair.B)):
            bases[side].append(before[side] @ optimizer.state[factor]["basis"])  # U = F R^-1
            assert torch.linalg.eigvalsh(optimizer.state[factor]["precond"]).min() >= 0
    for one in bases.values():
        for U in one:
            assert (U.mT @ U - torch.eye(4, dtype=U.dtype)).abs().max() < 1e-16 * max(1e4, 10 * condition)
        for new, old in itertools.pairwise(reversed(one)):
            assert torch.linalg.matrix_norm(new.mT @ old, 2) <= 1 + 1e-16 * max(1e4, 10 * condition)


def test_escaped_mass_is_never_negative_and_grows_where_bases_turn() -> None:
    pairs = new_pairs()
    rite = reference_of(pairs, lr=0.1, apply_escape=True)
    optimizer = make("rite", pairs, lr=0.1, apply_escape=True)
    for G in dense_gradients(pairs, 8):
        reference_step(rite, pairs, G)
        walk(optimizer, pairs, [G])
    for pair, one in zip(pairs, rite.pairs, strict=True):
        for factor, side in ((pair.A, one.side_A), (pair.B, one.side_B)):
            escape = optimizer.state[factor]["escape"]
            assert escape.item() >= 0.0
            assert escape.item() == pytest.approx(side.escape, rel=1e-8, abs=1e-14)
    assert any(optimizer.state[pair.A]["escape"].item() > 0 for pair in pairs)


# 4 and 5: the first step, and the size of the loss.


def test_the_first_step_has_equal_singular_values_the_root_of_the_length() -> None:
    pair, G = new_pair((10, 6, 2)), 0.05 * random(10, 6, seed=5)
    dA, dB = one_step("rite", pair, G, eps=1e-12, **OFF)
    N_A, N_B = pair.B.detach() @ dA, dB @ pair.A.detach()  # U_B N_A and N_B U_A^T
    values_A, values_B = (torch.linalg.svdvals(moved)[:2] for moved in (N_A, N_B))
    assert values_A.tolist() == pytest.approx([6**0.5] * 2, rel=1e-7)
    assert values_B.tolist() == pytest.approx([10**0.5] * 2, rel=1e-7)
    U_B, R_B = svd_basis(pair.B.detach())
    gbar = pair.scaling * U_B.mT @ G
    values, Q = torch.linalg.eigh(gbar @ gbar.mT / 6)
    assert relative(dA, torch.linalg.pinv(R_B) @ (Q / values.sqrt()) @ Q.mT @ gbar) <= 1e-7


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_the_size_of_the_loss_does_not_matter(size: float) -> None:
    ends = []
    for factor in (1.0, size):
        pairs = new_pairs([(10, 6, 2), (8, 9, 4)])
        gradients = [[factor * G for G in both] for both in dense_gradients(pairs, 12)]
        walk(make("rite", pairs, eps=1e-30, **OFF), pairs, gradients)
        ends.append(factors(pairs))
    for found, expected in zip(ends[1], ends[0], strict=True):
        assert relative(found, expected) <= 1e-9


# 6 and 7: rank-one gradients, skipping, clipping.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_one_gradients_move_both_factors_at_every_step(dtype: torch.dtype) -> None:
    pair = new_pair((10, 6, 4), dtype=dtype)
    optimizer = make("rite", [pair], lr=1e-2)
    left, right = random(10, 1, seed=3), random(1, 6, seed=4)
    for _ in range(40):
        before = factors([pair])
        walk(optimizer, [pair], [[0.05 * left @ right]])
        assert [torch.equal(new, old) for new, old in zip(factors([pair]), before, strict=True)] == [False, False]


def test_a_large_unmagnified_gradient_is_dropped_for_its_factor_alone() -> None:
    (pair,) = pairs = new_pairs([(10, 6, 2)], scaling=1.0)
    A, B = pair.A.detach(), pair.B.detach()
    quiet = dense_gradients(pairs, 4)
    inside_A = torch.linalg.pinv(A) @ A
    spike = quiet[3][0] + 40.0 * B @ random(2, 6, seed=6) @ (torch.eye(6, dtype=A.dtype) - inside_A)
    reference = reference_of(pairs, lr=1e-6)
    for G in quiet[:3]:
        reference_step(reference, pairs, G)
    R_A, R_B = svd_basis(A.mT)[1], svd_basis(B)[1]
    assert rms(torch.linalg.pinv(R_B).mT @ B.mT @ spike) > 1.0 > rms(spike @ A.mT @ torch.linalg.pinv(R_A))
    skipped, expected = copied(pairs), copied(pairs)
    for one, last in ((skipped, spike), (expected, None)):
        optimizer = make("rite", one, lr=1e-6, clip_unmagnified_grad=0.0)
        walk(optimizer, one, quiet[:3])
        one[0].give(spike)
        before = one[0].A.detach().clone()
        if last is None:
            one[0].A.grad.zero_()
        optimizer.step()
        assert not torch.equal(one[0].A, before)  # the momentum still moves it
    assert relative(skipped[0].A, expected[0].A) <= 1e-14
    assert relative(skipped[0].B, expected[0].B) <= 1e-14
    rite = reference_of(pairs, lr=1e-6, clip_unmagnified_grad=0.0)
    for G in [*quiet[:3], [spike]]:
        reference_step(rite, pairs, G)
    assert relative(skipped[0].A - pair.A, rite.pairs[0].A - A) <= 1e-6
    assert relative(skipped[0].B - pair.B, rite.pairs[0].B - B) <= 1e-6


@pytest.mark.parametrize(("clip", "shared"), [(1.0, True), (0.0, False)])
def test_the_clip_norm_is_that_of_all_pairs(clip: float, shared: bool) -> None:
    ends = []
    for size in (1.0, 3.0):
        pairs = new_pairs([(10, 6, 2), (8, 9, 4)])
        gradients = [
            [0.5 * G, 0.5 * size ** (step + 1) * H] for step, (G, H) in enumerate(dense_gradients(pairs, 3, size=1.0))
        ]
        walk(make("rite", pairs, clip_unmagnified_grad=clip, update_skipping=0.0), pairs, gradients)
        ends.append(factors(pairs[:1]))
    same = all(torch.equal(x, y) for x, y in zip(*ends, strict=True))
    assert same is not shared


def test_the_clip_norm_is_shared_over_groups_too() -> None:
    one, two = new_pairs([(10, 6, 2), (8, 9, 4)]), new_pairs([(10, 6, 2), (8, 9, 4)])
    gradients = dense_gradients(one, 5, size=1.0)
    walk(LoRARITEOptimizer([group_of(one)], lr=1e-2, update_skipping=0.0), one, gradients)
    walk(LoRARITEOptimizer([group_of([pair]) for pair in two], lr=1e-2, update_skipping=0.0), two, gradients)
    for found, expected in zip(factors(two), factors(one), strict=True):
        assert relative(found, expected) <= 1e-13


def test_capping_bounds_the_root_mean_square_of_the_step() -> None:
    pair, G = new_pair((10, 6, 2)), 0.05 * random(10, 6, seed=5)
    dA, dB = one_step("rite", pair, G, update_capping=0.25)
    for tall, other in ((pair.B.detach() @ dA, 6 * 2), (dB @ pair.A.detach(), 10 * 2)):
        assert (tall.square().sum() / other).sqrt().item() == pytest.approx(0.25, rel=1e-9)


# 8: the start of every LoRA.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_from_zero_B_the_first_step_moves_B_alone(dtype: torch.dtype) -> None:
    pair = new_pair(zero_B=True, dtype=dtype)
    start = pair.A.detach().clone()
    walk(make("rite", [pair]), [pair], dense_gradients([pair], 1))
    assert torch.equal(pair.A.detach(), start)
    assert pair.B.any()


def test_from_zero_B_the_product_grows_in_proportion_to_the_learning_rate() -> None:
    norms = []
    for lr in (1e-3, 1e-4):
        pair = new_pair(zero_B=True)
        walk(make("rite", [pair], lr=lr), [pair], dense_gradients([pair], 10))
        norms.append(torch.linalg.matrix_norm(pair.product(), 2).item())
    assert norms[0] / norms[1] == pytest.approx(10.0, rel=1e-6)


def test_a_first_step_at_rate_zero_does_no_harm() -> None:
    pair = new_pair(zero_B=True)
    optimizer = make("rite", [pair], lr=1e-3)
    optimizer.param_groups[0]["lr"] = 0.0
    walk(optimizer, [pair], dense_gradients([pair], 1))
    assert not pair.B.any()
    optimizer.param_groups[0]["lr"] = 1e-3
    walk(optimizer, [pair], dense_gradients([pair], 5))
    assert pair.B.any()
    assert all(factor.isfinite().all() for factor in factors([pair]))


# 9: factors and gradients that something is wrong with.


@pytest.mark.parametrize("shape", [(3, 8, 5), (8, 3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rank_above_a_dimension_stays_finite(shape, dtype) -> None:
    pair = new_pair(shape, dtype=dtype)
    walk(make("rite", [pair], lr=1e-3), [pair], dense_gradients([pair], 20))
    assert all(factor.isfinite().all() and factor.abs().max() < 10 for factor in factors([pair]))


@pytest.mark.parametrize("shape", [(3, 8, 5), (8, 3, 5), (2, 3, 4)])
@pytest.mark.parametrize("zero_B", [False, True])
def test_a_rank_above_a_dimension_follows_the_reference(shape, zero_B) -> None:
    assert against_reference([new_pair(shape, zero_B=zero_B)], 12, lr=1e-3) <= 1e-8


def test_a_dead_index_stays_exactly_zero_and_leaves_the_rest_alone() -> None:
    pair = new_pair((9, 7, 3))
    with torch.no_grad():
        pair.A[1], pair.B[:, 1] = 0.0, 0.0
    kept = [0, 2]
    small = Pair(nn.Parameter(pair.A.detach()[kept].clone()), nn.Parameter(pair.B.detach()[:, kept].clone()), 2.0)
    gradients = dense_gradients([pair], 10)
    for one in (pair, small):
        walk(make("rite", [one], clip_unmagnified_grad=0.0, update_skipping=0.0), [one], gradients)
    assert not pair.A[1].any()
    assert not pair.B[:, 1].any()
    assert relative(pair.A.detach()[kept], small.A) <= 1e-10
    assert relative(pair.B.detach()[:, kept], small.B) <= 1e-10


@pytest.mark.parametrize("odd", ["rank above a dimension", "dead index", "no gradient", "NaN", "Inf", "zero factors"])
def test_an_odd_pair_does_not_change_a_bit_of_the_others(odd: str) -> None:
    shape = (10, 2, 4) if odd == "rank above a dimension" else (10, 6, 4)
    others, alone = new_pairs(MIXED), new_pairs(MIXED)
    strange = new_pair(shape, seed=99)
    with torch.no_grad():
        if odd == "dead index":
            strange.A[1], strange.B[:, 1] = 0.0, 0.0
        if odd == "zero factors":
            strange.A.zero_(), strange.B.zero_()
    together = [*others[:3], strange, *others[3:]]
    optimizers = [make("rite", pairs, clip_unmagnified_grad=0.0) for pairs in (together, alone)]
    for G in dense_gradients(alone, 6):
        for pair, twin, one in zip(others, alone, G, strict=True):
            pair.give(one), twin.give(one)
        strange.give(0.05 * random(shape[0], shape[1], seed=5))
        if odd == "no gradient":
            strange.A.grad = strange.B.grad = None
        elif odd in ("NaN", "Inf"):
            strange.A.grad[0, 0] = float(odd.lower())
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(factors(others), factors(alone))


# The slow reference over everything at once.


@pytest.mark.parametrize(
    ("variant", "zero_B"), [*((variant, False) for variant in sorted(VARIANTS)), ("default", True), ("escape", True)]
)
def test_mixed_pairs_follow_the_reference(variant: str, zero_B: bool) -> None:
    pairs = new_pairs(MIXED, zero_B=zero_B)
    assert against_reference(pairs, 8, size=0.3, **VARIANTS[variant]) <= 1e-9


@settings(max_examples=10)
@given(st.integers(5, 16), st.integers(5, 16), st.integers(1, 5), st.integers(0, 2**16), st.floats(1e-4, 10.0))
def test_any_shape_and_size_follows_the_reference(out_features, in_features, rank, seed, size) -> None:
    pair = new_pair((out_features, in_features, rank), seed=seed)
    assert against_reference([pair], 6, size=size) <= 1e-8


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_with_one_factor_frozen_only_the_other_side_runs(frozen: str) -> None:
    (pair,) = pairs = new_pairs([(10, 6, 2)])
    still = getattr(pair, frozen).requires_grad_(False)
    start = still.detach().clone()
    rite = reference_of(pairs, clip_unmagnified_grad=0.0)
    optimizer = make("rite", pairs, clip_unmagnified_grad=0.0)
    moving, name = (pair.B, "B") if frozen == "A" else (pair.A, "A")
    for (G,) in dense_gradients(pairs, 8):
        one = rite.pairs[0]
        reference_step(rite, pairs, [G])
        setattr(one, frozen, start.clone())
        pair.give(G)
        still.grad = None
        optimizer.step()
        assert torch.equal(still.detach(), start)
        assert relative(moving, getattr(one, name)) <= 1e-10


def test_the_bias_correction_is_folded_into_the_decay() -> None:
    assert debiased(0.9, 1) == 0.0
    assert debiased(0.9, 2) == pytest.approx(0.9 * 0.1 / (1 - 0.81), rel=1e-12)


def test_a_case_worked_by_hand() -> None:
    """Rank 1, in = out = 1, s = 1, A = 2, B = 3, G = 0.5: U = 1, R_A = 2, R_B = 3; gbar = 0.5 on both sides.

    Step 1: V = 0.25, N = 0.5 / (0.5 + 1e-6), M = N; A moves by -lr N / 3, B by -lr N / 2.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    pair = Pair(nn.Parameter(2 * one), nn.Parameter(3 * one), 1.0)
    N = 0.5 / (0.5 + 1e-6)
    dA, dB = one_step("rite", pair, 0.5 * one)
    assert dA.item() == pytest.approx(N / 3, rel=1e-12)
    assert dB.item() == pytest.approx(N / 2, rel=1e-12)


# The method's settings.


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"betas": (1.0, 0.9)}, r"betas.*1\.0.*\[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas.*-0\.1"),
        ({"eps": float("nan")}, r"eps.*nan"),
        ({"clip_unmagnified_grad": float("inf")}, r"clip_unmagnified_grad.*inf"),
        ({"update_skipping": "1"}, r"update_skipping.*'1'"),
        ({"update_capping": True}, r"update_capping.*True"),
        ({"apply_escape": 1}, r"apply_escape.*true or false"),
        ({"balance_param": "yes"}, r"balance_param.*'yes'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_with_what_is_allowed(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora-rite\.{said}"):
        LoRARITE(**wrong)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoRARITE(eps=-1.0, update_capping=-0.5, apply_escape="no")  # type: ignore[arg-type]
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_method_builds_the_optimizer_with_its_settings(variant: str) -> None:
    given_settings = {key: value for key, value in VARIANTS[variant].items() if key != "weight_decay"}
    method = LoRARITE(betas=(0.8, 0.99), eps=1e-7, **given_settings)
    pairs, others = new_pairs([(10, 6, 2), (8, 9, 4)]), new_pairs([(10, 6, 2), (8, 9, 4)])
    gradients = dense_gradients(pairs, 5, size=0.3)
    walk(method.make_optimizer([group_of(pairs, weight_decay=0.05)], lr=1e-2), pairs, gradients)
    direct = make("rite", others, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.05, **given_settings)
    walk(direct, others, gradients)
    assert_same_bits(factors(pairs), factors(others))


def test_the_official_preset_is_the_default_and_the_trainer_must_not_clip() -> None:
    assert method_from_id("lora-rite", preset="official") == LoRARITE()
    assert LoRARITE.unclipped is True
    assert (LoRARITE().clip_unmagnified_grad, LoRARITE().update_skipping, LoRARITE().apply_escape) == (1.0, 1.0, False)
