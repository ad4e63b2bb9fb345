"""Importance: every kind against a hand-worked case and a slow float64 reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.calibration.statistics import GradientStatistics, LayerStatistics
from rankwise.errors import CalibrationError
from rankwise.methods.importance import (
    StopRule,
    estimated_singular_values,
    has_converged,
    importance_of,
    mean_absolute_product,
    measured_importance,
    softmax_shares,
    sum_shares,
)
from rankwise.ranks.shapes import LayerShape
from tests.methods.support import random

W = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
G = torch.tensor([[3.0, 2.0], [5.0, -1.0]])
# W * G = [[3, -4], [0, -3]]


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("union_mean", (3 + 4 + 0 + 3) / 4),
        ("union_frobenius_norm", math.sqrt(9 + 16 + 9)),
        ("union_2ord_norm", (5 + 3) / 2),
        # singular values of [[3, -4], [0, -3]]: their product is 9, the sum of their squares 34
        ("union_nuc_norm", math.sqrt(34 + 2 * 9)),
        ("grad_mean", 11 / 4),
        ("grad_frobenius_norm", math.sqrt(9 + 4 + 25 + 1)),
        ("grad_nuc_norm", math.sqrt(39 + 2 * 13)),  # |det G| = 13
    ],
)
def test_each_kind_on_a_case_worked_by_hand(kind: str, value: float) -> None:
    assert importance_of(kind, W, G, 2, stream()).tolist() == pytest.approx([value], rel=1e-6)


def test_entropy_is_that_of_a_gaussian_with_the_gradients_unbiased_deviation() -> None:
    deviation = math.sqrt(sum((g - 2.25) ** 2 for g in (3, 2, 5, -1)) / 3)
    expected = math.log(deviation) + 0.5 * math.log(2 * math.pi) + 0.5
    assert importance_of("grad_entropy", W, G, 2, stream()).item() == pytest.approx(expected, rel=1e-6)
    floored = math.log(1e-8) + 0.5 * math.log(2 * math.pi) + 0.5
    assert importance_of("grad_entropy", W, torch.zeros(2, 2), 2, stream()).item() == pytest.approx(floored)


@pytest.mark.parametrize(("kind", "matrix"), [("grad_est_nuc_norm", G), ("union_est_nuc_norm", W * G)])
def test_the_estimated_kinds_are_sums_of_log1p(kind: str, matrix: Tensor) -> None:
    expected = torch.linalg.svdvals(matrix.double()).log1p().sum().item()
    assert importance_of(kind, W, G, 2, stream()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [(40, 24), (24, 40)])
def test_the_estimate_is_that_of_torchs_randomized_svd(size: tuple[int, int]) -> None:
    matrix = random(*size, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        expected = torch.svd_lowrank(matrix, q=6, niter=8)[1]
    found = estimated_singular_values(matrix, 6, torch.Generator().manual_seed(11))
    assert torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        ("union_mean_grad_nuc_norm", ("union_mean", "grad_est_nuc_norm")),
        ("union_mean_union_nuc_norm", ("union_mean", "union_est_nuc_norm")),
        ("grad_mean_grad_nuc_norm", ("grad_mean", "grad_est_nuc_norm")),
    ],
)
def test_a_pair_holds_both_members(kind: str, members: tuple[str, str]) -> None:
    pair = importance_of(kind, W, G, 2, stream())
    assert pair.tolist() == [importance_of(member, W, G, 2, stream()).item() for member in members]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 5000), seed=st.integers(0, 5), half=st.booleans())
def test_the_blocked_mean_equals_the_float64_one(rows: int, columns: int, seed: int, half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    weight, gradient = random(rows, columns, seed=seed).to(dtype), random(rows, columns, seed=seed + 9).to(dtype)
    expected = (weight.double() * gradient.double()).abs().mean().item()
    assert mean_absolute_product(weight, gradient) == pytest.approx(expected, rel=1e-6)


def test_measuring_leaves_weight_and_gradient_alone() -> None:
    weight, gradient = random(9, 5), random(9, 5, seed=1)
    kept = weight.clone(), gradient.clone()
    for kind in ("union_mean", "grad_mean", "union_nuc_norm", "grad_entropy", "union_mean_grad_nuc_norm"):
        importance_of(kind, weight, gradient, 2, stream())
    assert torch.equal(weight, kept[0])
    assert torch.equal(gradient, kept[1])


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
def test_shares_add_up_to_one_and_keep_the_order(values: list[float]) -> None:
    importance = torch.tensor(values, dtype=torch.float64)
    for shares in (sum_shares(importance), softmax_shares(importance, 0.5)):
        assert shares.sum().item() == pytest.approx(1.0)
        ordered = shares[importance.argsort()]
        assert (ordered.diff() >= -1e-12).all()


def test_softmax_on_a_case_worked_by_hand() -> None:
    shares = softmax_shares(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64), 0.5)
    exponentials = [math.exp(0), math.exp(2), math.exp(1)]
    assert shares.tolist() == pytest.approx([value / sum(exponentials) for value in exponentials])


def test_softmax_over_importances_equal_up_to_noise_is_uniform() -> None:
    assert softmax_shares(torch.tensor([1.0, 1.0 + 1e-8, 1.0]), 0.5).tolist() == pytest.approx([1 / 3] * 3)
    assert softmax_shares(torch.tensor([2.0]), 0.5).tolist() == [1.0]


def test_convergence_asks_every_layer_and_both_members() -> None:
    before = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    assert has_converged(before, before * 1.09, 0.1, 1e-8)
    for layer, member in ((0, 0), (0, 1), (1, 0), (1, 1)):
        after = before.clone()
        after[layer, member] *= 1.2
        assert not has_converged(before, after, 0.1, 1e-8)


def test_the_stop_rule_waits_for_the_least_batches_and_for_every_layer() -> None:
    rule = StopRule(3, 0.1, "absolute")
    steady, moving = torch.tensor([1.0]), lambda t: torch.tensor([2.0**t])
    assert [rule(t, {"a": steady, "b": steady}) for t in (1, 2, 3)] == [False, False, True]
    assert [rule(t, {"a": steady, "b": moving(t)}) for t in (1, 2, 3, 4)] == [False] * 4
    assert not rule(1, {"a": steady, "b": moving(4)})  # the first batch of another calibration starts anew


def test_the_relative_floor_lets_negligible_layers_settle() -> None:
    tiny = {"a": torch.tensor([1.0]), "b": torch.tensor([1e-7])}
    doubled = {"a": torch.tensor([1.0]), "b": torch.tensor([2e-7])}
    for floor, stops in (("relative", True), ("absolute", False)):
        rule = StopRule(2, 0.1, floor)
        rule(1, tiny)
        assert rule(2, doubled) is stops


def statistics(scores: dict[str, Tensor | None], batches: int = 1) -> GradientStatistics:
    layers = {
        name: LayerStatistics(shape=LayerShape(name, 2, 2), batches=0 if row is None else batches, scores=row)
        for name, row in scores.items()
    }
    return GradientStatistics(layers=layers, batches=1, skipped=0, tokens=1, loss=1, memory="exact", collector="outer")


def test_importances_come_in_the_order_of_the_layers_and_unreached_ones_are_zero() -> None:
    shapes = [LayerShape(name, 2, 2) for name in "bca"]
    pair = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0]), "c": None}
    assert measured_importance(shapes, statistics(pair)).tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]


def test_missing_and_non_finite_importances_are_named_all_at_once() -> None:
    shapes = [LayerShape(name, 2, 2) for name in ("up", "down", "gone")]
    scores = {"up": torch.tensor([float("nan")]), "down": torch.tensor([float("inf")])}
    with pytest.raises(CalibrationError, match=r"(?s)layer up.*nan.*layer down.*inf.*layer gone"):
        measured_importance(shapes, statistics(scores))
    with pytest.raises(CalibrationError, match="calibration batches"):
        measured_importance(shapes, None)
