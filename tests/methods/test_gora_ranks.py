"""GoRA's ranks: the three rules by hand, and the acceptance properties of gora.md section 6 that concern them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import BudgetError, CalibrationError, ConfigError
from rankwise.methods.gora import GoRA, official_ranks, paper_ranks
from rankwise.ranks.shapes import LayerShape, uniform_budget
from tests.methods.support import Known, budget_of, known, random, ranks_of, several, statistics_of

SIZES = [(24, 32), (64, 32), (32, 64), (32, 32), (48, 24), (20, 40)]
SQUARE = [LayerShape(name, 8, 8) for name in "abcd"]
SCALE_FREE = [
    "union_mean",
    "union_frobenius_norm",
    "union_2ord_norm",
    "union_nuc_norm",
    "grad_mean",
    "grad_frobenius_norm",
    "grad_nuc_norm",
]
MODES = [GoRA(), GoRA(rank_mode="paper"), GoRA(rank_mode="official", phi="linear")]


def scaled(layers: list[Known], factor: float) -> list[Known]:
    return [replace(layer, gradient=layer.gradient * factor) for layer in layers]


def spent(ranks: tuple[int, ...], layers: list[Known]) -> int:
    return sum(rank * layer.shape.cost for rank, layer in zip(ranks, layers, strict=True))


def test_the_official_rule_on_a_case_worked_by_hand() -> None:
    # f = 16 each, b = 4 * 64 = 256; b a = 128, 76.8, 38.4, 12.8
    shares = [0.5, 0.3, 0.15, 0.05]
    arguments = {"phi": "linear", "r_min": 1, "r_max": 6}
    assert official_ranks(shares, SQUARE, 4, rounding="moderate", **arguments) == (6, 4, 2, 1)  # 128, 77, 38, 13 // 16
    assert official_ranks([0.5, 0.3, 0.1872, 0.0128], SQUARE, 4, rounding="radical", **arguments) == (6, 4, 3, 1)
    assert official_ranks([0.5, 0.3, 0.1872, 0.0128], SQUARE, 4, rounding="conserved", **arguments) == (6, 4, 2, 1)


def test_the_official_rule_clamps_only_if_both_bounds_are_above_zero() -> None:
    unclamped = official_ranks([0.9, 0.1, 0, 0], SQUARE, 4, phi="sqrt", rounding="moderate", r_min=0, r_max=6)
    # sqrt(16) = 4, b = 64: 57.6 -> 58 // 4 = 14, 6.4 -> 6 // 4 = 1
    assert unclamped == (14.0, 1.0, 0.0, 0.0)
    assert all(isinstance(rank, float) for rank in unclamped)


def test_the_papers_rule_on_a_case_worked_by_hand() -> None:
    # phi = sqrt(16) = 4, b = 4 * 16 = 64; b a / phi = 8, 4.8, 2.4, 0.8
    assert paper_ranks([0.5, 0.3, 0.15, 0.05], SQUARE, 4, phi="sqrt", r_min=2, r_max=6) == (6, 5, 2, 2)


def test_the_exact_rule_on_a_case_worked_by_hand() -> None:
    weight = torch.ones(8, 8)
    layers = [known(name, weight, weight * size) for name, size in zip("abcd", (8, 4, 3, 1), strict=True)]
    assert ranks_of(GoRA(r_min=1, r_max=8), layers, r=4) == (8, 4, 3, 1)
    assert ranks_of(GoRA(r_min=2, r_max=8), layers, r=4) == (7, 4, 3, 2)


@pytest.mark.parametrize("importance", SCALE_FREE)
@pytest.mark.parametrize("change", [{}, {"scale_importance": True}, {"normalization": "softmax"}])
def test_property_8_scaling_the_gradients_leaves_ranks_unchanged(importance: str, change: dict[str, object]) -> None:
    layers = several(SIZES)
    for mode in MODES:
        method = replace(mode, importance=importance, **change)
        assert ranks_of(method, scaled(layers, 173.0)) == ranks_of(method, layers)


@pytest.mark.parametrize("importance", ["grad_est_nuc_norm", "grad_entropy"])
def test_property_8_does_not_hold_for_logarithmic_importances(importance: str) -> None:
    layers = several(SIZES)
    method = GoRA(importance=importance, r_min=1)
    assert ranks_of(method, scaled(layers, 173.0)) != ranks_of(method, layers)


def test_property_8_signs_of_weight_and_gradient_do_not_matter() -> None:
    layers = several(SIZES)
    flipped = [
        replace(layer, weight=-layer.weight, gradient=layer.gradient * random(*layer.gradient.shape, seed=7).sign())
        for layer in layers
    ]
    for mode in MODES:
        assert ranks_of(mode, flipped) == ranks_of(mode, layers)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.rank_mode)
def test_property_9_permuting_layers_permutes_ranks(mode: GoRA) -> None:
    layers = several(SIZES, seed=2)
    order = [3, 0, 5, 1, 4, 2]
    assert ranks_of(mode, [layers[k] for k in order]) == tuple(ranks_of(mode, layers)[k] for k in order)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.rank_mode)
def test_property_9_the_sum_over_batches_gives_the_ranks_of_the_mean(mode: GoRA) -> None:
    layers = several(SIZES, seed=3)
    assert ranks_of(mode, scaled(layers, 64.0)) == ranks_of(mode, layers)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    r=st.integers(1, 12),
    bounds=st.tuples(st.integers(0, 12), st.integers(1, 60)),
    mode=st.sampled_from(MODES),
)
def test_property_10_ranks_keep_their_bounds_and_the_layers_size(
    seed: int, r: int, bounds: tuple[int, int], mode: GoRA
) -> None:
    low, high = min(bounds[0], r, bounds[1]), bounds[1]
    layers = several(SIZES, seed=seed)
    unclamped = mode.rank_mode == "official" and low == 0
    for rank, layer in zip(ranks_of(replace(mode, r_min=low, r_max=high), layers, r=r), layers, strict=True):
        top = layer.shape.max_rank
        assert min(low, top) <= rank <= (top if unclamped else min(high, top))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.rank_mode)
def test_property_10_equal_bounds_are_a_uniform_rank(mode: GoRA) -> None:
    assert ranks_of(replace(mode, r_min=8, r_max=8), several(SIZES)) == (8,) * len(SIZES)


@pytest.mark.parametrize("r", [1, 4, 8, 16])
def test_property_10_equal_shapes_and_importances_all_get_the_reference_rank(r: int) -> None:
    weight, gradient = random(32, 32), random(32, 32, seed=1)
    layers = [known(f"layers.{k}", weight, gradient) for k in range(7)]
    for mode in MODES:
        assert ranks_of(mode, layers, r=r) == (r,) * 7


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), r=st.integers(2, 10), mode=st.sampled_from(MODES))
def test_property_11_among_equal_shapes_more_importance_never_gets_less(seed: int, r: int, mode: GoRA) -> None:
    layers = several([(32, 32)] * 6, seed=seed)
    shapes = [layer.shape for layer in layers]
    budget = budget_of(shapes, r)
    allocation = mode.allocate(shapes, budget, statistics_of(mode, layers, budget))
    assert allocation.importance is not None
    ordered = sorted(zip(allocation.importance, allocation.ranks, strict=True))
    assert [rank for _, rank in ordered] == sorted(allocation.ranks)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), r=st.integers(1, 10))
def test_property_12_exact_keeps_the_budget_and_leaves_less_than_one_rank(seed: int, r: int) -> None:
    layers = several(SIZES, seed=seed)
    method = GoRA(r_min=0, r_max=20)
    ranks = ranks_of(method, layers, r=r)
    left = uniform_budget([layer.shape for layer in layers], r) - spent(ranks, layers)
    growing = [
        layer.shape.cost
        for rank, layer in zip(ranks, layers, strict=True)
        if rank < min(20, layer.shape.max_rank) and layer.gradient.any()
    ]
    assert left >= 0
    assert not growing or left < min(growing)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_property_12_nearest_rounding_stays_within_half_a_rank_of_the_budget(seed: int) -> None:
    layers = several(SIZES, seed=seed)
    method = GoRA(rank_mode="paper", phi="linear", r_min=0, r_max=10_000, normalization="softmax", temperature=4.0)
    ranks = ranks_of(method, layers)
    assert all(rank < layer.shape.max_rank for rank, layer in zip(ranks, layers, strict=True)), "a clamp was active"
    budget = uniform_budget([layer.shape for layer in layers], 8)
    assert abs(spent(ranks, layers) - budget) / budget <= 0.5 / 8


@pytest.mark.parametrize("normalization", ["sum", "softmax"])
@pytest.mark.parametrize("importance", ["union_mean", "grad_est_nuc_norm", "grad_entropy", "union_mean_grad_nuc_norm"])
@pytest.mark.parametrize("rank_mode", ["exact", "paper"])
def test_property_13_a_layer_without_gradient_gets_the_least_rank(
    rank_mode: str, importance: str, normalization: str
) -> None:
    layers = several(SIZES)
    layers[2] = replace(layers[2], gradient=torch.zeros_like(layers[2].gradient))
    ranks = ranks_of(GoRA(rank_mode=rank_mode, importance=importance, normalization=normalization), layers)
    assert ranks[2] == 4
    assert max(ranks) > 4


def test_a_layer_that_no_batch_reached_gets_the_least_rank() -> None:
    layers = several(SIZES)
    shapes = [layer.shape for layer in layers]
    budget = budget_of(shapes)
    statistics = statistics_of(GoRA(), layers, budget)
    unreached = replace(statistics.layers["layers.2"], batches=0, scores=None, projection=None)
    statistics = replace(statistics, layers={**statistics.layers, "layers.2": unreached})
    assert GoRA().allocate(shapes, budget, statistics).ranks[2] == 4


def test_no_gradient_anywhere_gives_equal_shares_and_says_so() -> None:
    layers = [replace(layer, gradient=torch.zeros_like(layer.gradient)) for layer in several([(32, 32)] * 3)]
    shapes = [layer.shape for layer in layers]
    budget = budget_of(shapes)
    for mode in MODES:
        allocation = mode.allocate(shapes, budget, statistics_of(mode, layers, budget))
        assert allocation.ranks == (8, 8, 8)
        assert "no layer had a gradient" in allocation.notes[1]


def test_a_rank_of_zero_is_possible_only_if_asked_for() -> None:
    layers = several([(32, 32)] * 4)
    layers[1] = replace(layers[1], gradient=layers[1].gradient * 1e-6)
    assert ranks_of(GoRA(r_min=0), layers)[1] == 0
    assert ranks_of(GoRA(), layers)[1] == 4


@pytest.mark.parametrize(("r", "low", "high"), [(1, 1, 4), (2, 1, 8), (3, 1, 12), (8, 4, 32), (16, 8, 64)])
def test_the_default_bounds_are_half_and_four_times_the_reference_rank(r: int, low: int, high: int) -> None:
    assert GoRA().bounds(budget_of(SQUARE, r)) == (low, high)


def test_floors_above_the_budget_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(BudgetError, match=r"r_min: rank 9 in each of 6 layers costs .* above the budget of .*\(r: 8\)"):
        ranks_of(GoRA(r_min=9, r_max=32), several(SIZES))


def test_bounds_that_cross_under_this_budget_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"r_min: 40 is above r_max 32 \(r is 8\)"):
        GoRA(r_min=40).bounds(budget_of(SQUARE, 8))
    with pytest.raises(ConfigError, match=r"r_min: 4 is above r_max 2"):
        GoRA(r_max=2).request(SQUARE, budget_of(SQUARE, 8), 0)


def test_the_notes_tell_the_budget_and_what_was_clamped() -> None:
    layers = several(SIZES)
    shapes = [layer.shape for layer in layers]
    budget = budget_of(shapes)
    for mode in MODES:
        allocation = mode.allocate(shapes, budget, statistics_of(mode, layers, budget))
        used = spent(allocation.ranks, layers)
        assert f"{used} of {budget.parameters} parameters ({used / budget.parameters:.3f})" in allocation.notes[0]
        floored = sum(rank == 4 for rank in allocation.ranks)
        assert f"{floored} at r_min 4" in allocation.notes[0]
        assert sum("the floor r_min" in reason for reason in allocation.reasons) == floored
        assert sum(allocation.importance or ()) == pytest.approx(1.0, abs=1e-6)


def test_inverted_entropies_are_told() -> None:
    layers = scaled(several(SIZES), 1e-4)
    shapes = [layer.shape for layer in layers]
    budget = budget_of(shapes)
    for normalization, told in (("sum", True), ("softmax", False)):
        method = GoRA(importance="grad_entropy", normalization=normalization)
        notes = method.allocate(shapes, budget, statistics_of(method, layers, budget)).notes
        assert any("inverted" in note for note in notes) is told


def test_the_root_of_a_negative_entropy_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"layers\.0"):
        ranks_of(GoRA(importance="grad_entropy", scale_importance=True), scaled(several(SIZES), 1e-4))


def test_non_finite_importances_name_the_layer() -> None:
    layers = several(SIZES)
    layers[3] = replace(layers[3], gradient=layers[3].gradient * float("inf"))
    for mode in MODES:
        with pytest.raises(CalibrationError, match=r"layer layers\.3"):
            ranks_of(mode, layers)


def test_allocating_without_statistics_asks_for_calibration_batches() -> None:
    with pytest.raises(CalibrationError, match="calibration batches"):
        GoRA().allocate(SQUARE, budget_of(SQUARE), None)
