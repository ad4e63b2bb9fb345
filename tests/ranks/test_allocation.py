"""Water-filling against a slow exact reference and the acceptance properties of GoRA's specification, section 6."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import BudgetError, ConfigError
from rankwise.ranks.allocation import water_fill
from rankwise.ranks.shapes import LayerShape, uniform_budget

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def problems(draw, shapes=None, least_share=0):
    """Layers, whole-number shares (so that the reference is exact), floor, cap and a budget that the floors fit in."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=9)) if shapes is None else shapes
    layers = [LayerShape(f"layer.{i}", *size) for i, size in enumerate(sizes)]
    shares = draw(st.lists(st.integers(least_share, 1000), min_size=len(layers), max_size=len(layers)).filter(any))
    floor = draw(st.integers(0, 6))
    cap = draw(st.none() | st.integers(max(floor, 1), 30))
    least = sum(min(floor, _cap(x, cap)) * x.cost for x in layers)
    budget = draw(st.integers(least, least + uniform_budget(layers, 12)))
    return shares, layers, budget, floor, cap


def _cap(shape, cap):
    return shape.max_rank if cap is None else min(cap, shape.max_rank)


def _cost(ranks, layers):
    return sum(rank * layer.cost for rank, layer in zip(ranks, layers, strict=True))


def reference(shares, layers, budget, floor, cap):
    """GoRA 3.4 `exact` in rational numbers: plain bisection on the level, then rank by rank."""
    caps = [_cap(x, cap) for x in layers]
    lows = [min(floor, top) for top in caps]
    caps = [top if share else low for share, low, top in zip(shares, lows, caps, strict=True)]

    def wished(level):
        return [min(max(level * s, Fraction(lo)), Fraction(up)) for s, lo, up in zip(shares, lows, caps, strict=True)]

    below, above = Fraction(0), Fraction(2 * max(caps))
    if _cost(wished(above), layers) <= budget:
        return tuple(caps)
    for _ in range(80):
        middle = (below + above) / 2
        if _cost(wished(middle), layers) <= budget:
            below = middle
        else:
            above = middle
    targets = [round(target * 10**9) for target in wished(below)]
    ranks = [target // 10**9 for target in targets]
    order = sorted(range(len(layers)), key=lambda i: (-(targets[i] % 10**9), -shares[i], layers[i].name))
    for _ in range(budget + 1):
        for i in order:
            if ranks[i] < caps[i] and _cost(ranks, layers) + layers[i].cost <= budget:
                ranks[i] += 1
    return tuple(ranks)


@given(problems())
def test_it_equals_the_slow_rational_reference(problem):
    shares, layers, budget, floor, cap = problem
    assert water_fill(shares, layers, budget, floor=floor, cap=cap) == reference(shares, layers, budget, floor, cap)


def test_a_case_worked_by_hand():
    # Costs 8, 10, 10. At level 1 the shares cost 24 + 20 + 10 = 54, so the level is 48/54: 2.67, 1.78, 0.89, down to
    # 2, 1, 0 = 26; of the 22 left c (.89) takes 10, then b (.78) 10; a does not fit into 2.
    layers = [LayerShape("a", 4, 4), LayerShape("b", 5, 5), LayerShape("c", 5, 5)]
    assert water_fill([3.0, 2.0, 1.0], layers, 48, floor=0, cap=None) == (2, 2, 1)


def test_a_capped_case_worked_by_hand():
    # a holds at most 2 ranks of cost 8; 56 - 16 = 40 = 30 * level: 2, 2.67, 1.33, down to 2, 2, 1 = 46; b takes the 10.
    layers = [LayerShape("a", 2, 6), LayerShape("b", 5, 5), LayerShape("c", 5, 5)]
    assert water_fill([3.0, 2.0, 1.0], layers, 56, floor=0, cap=None) == (2, 3, 1)


@given(problems())
def test_it_never_costs_more_than_the_budget_and_leaves_less_than_one_rank_that_fits(problem):
    shares, layers, budget, floor, cap = problem
    ranks = water_fill(shares, layers, budget, floor=floor, cap=cap)
    left = budget - _cost(ranks, layers)
    assert left >= 0
    growing = [x.cost for x, r, s in zip(layers, ranks, shares, strict=True) if s and r < _cap(x, cap)]
    assert not growing or left < min(growing)


@given(problems())
def test_ranks_stay_between_floor_and_cap(problem):
    shares, layers, budget, floor, cap = problem
    for rank, layer in zip(water_fill(shares, layers, budget, floor=floor, cap=cap), layers, strict=True):
        assert min(floor, layer.max_rank) <= rank <= _cap(layer, cap)


@given(problems(), st.floats(1e-12, 1e12))
def test_a_common_factor_of_the_shares_changes_nothing(problem, factor):
    shares, layers, budget, floor, cap = problem
    scaled = [share * factor for share in shares]
    assert water_fill(scaled, layers, budget, floor=floor, cap=cap) == water_fill(
        shares, layers, budget, floor=floor, cap=cap
    )


@given(problems(), st.randoms(use_true_random=False))
def test_permuting_the_layers_permutes_the_ranks(problem, random):
    shares, layers, budget, floor, cap = problem
    ranks = water_fill(shares, layers, budget, floor=floor, cap=cap)
    order = list(range(len(layers)))
    random.shuffle(order)
    moved = water_fill([shares[i] for i in order], [layers[i] for i in order], budget, floor=floor, cap=cap)
    assert moved == tuple(ranks[i] for i in order)


@given(problems(shapes=[(12, 20)] * 6))
def test_among_equal_shapes_a_larger_share_never_gets_less(problem):
    shares, layers, budget, floor, cap = problem
    ranks = water_fill(shares, layers, budget, floor=floor, cap=cap)
    ordered = [rank for _, rank in sorted(zip(shares, ranks, strict=True))]
    assert ordered == sorted(ordered)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-9, 1e9))
def test_equal_shapes_and_shares_get_the_reference_rank(count, r, share):
    layers = [LayerShape(f"layer.{i}", 16, 24) for i in range(count)]
    budget = uniform_budget(layers, r)
    assert water_fill([share] * count, layers, budget, floor=0, cap=None) == (r,) * count


@given(st.lists(SIZES, min_size=1, max_size=6), st.integers(1, 8), st.data())
def test_equal_floor_and_cap_give_a_uniform_rank(sizes, r, data):
    layers = [LayerShape(f"layer.{i}", a + 8, b + 8) for i, (a, b) in enumerate(sizes)]
    shares = data.draw(st.lists(st.integers(1, 9), min_size=len(layers), max_size=len(layers)))
    assert water_fill(shares, layers, uniform_budget(layers, r), floor=r, cap=r) == (r,) * len(layers)


def test_a_zero_share_stays_at_the_floor_even_where_budget_is_left():
    layers = [LayerShape("a", 4, 4), LayerShape("b", 4, 4)]
    assert water_fill([0.0, 1.0], layers, 8 * 8, floor=1, cap=None) == (1, 4)
    assert water_fill([0.0, 1.0], layers, 8 * 3, floor=0, cap=None) == (0, 3)


def test_a_budget_above_every_cap_is_allowed():
    layers = [LayerShape("a", 2, 9), LayerShape("b", 4, 4)]
    assert water_fill([1.0, 5.0], layers, 10**9, floor=1, cap=3) == (2, 3)


def test_a_layer_smaller_than_the_floor_gets_its_full_size():
    layers = [LayerShape("small", 2, 9), LayerShape("large", 64, 64)]
    assert water_fill([1.0, 1.0], layers, uniform_budget(layers, 8), floor=4, cap=None)[0] == 2


def test_shares_at_the_ends_of_float64_are_handled_exactly():
    layers = [LayerShape(name, 8, 8) for name in "abc"]
    assert water_fill([5e-324, 1e308, 1e308], layers, 16 * 16, floor=0, cap=None) == (0, 8, 8)
    assert water_fill([5e-324, 1e308, 1e308], layers, 18 * 16, floor=0, cap=None) == (2, 8, 8)


def test_last_digit_noise_in_the_shares_does_not_move_a_rank():
    layers = [LayerShape(f"layer.{i}", 8, 8) for i in range(3)]
    assert water_fill([0.1 + 0.2, 0.3, 0.3], layers, uniform_budget(layers, 5), floor=0, cap=None) == (5, 5, 5)


def test_ties_are_broken_by_the_layer_name():
    layers = [LayerShape("b", 8, 8), LayerShape("a", 8, 8)]
    assert water_fill([1.0, 1.0], layers, 3 * 16, floor=0, cap=None) == (1, 2)


def test_floors_above_the_budget_are_refused_with_the_figures_and_the_r_that_would_do():
    layers = [LayerShape("a", 4, 6), LayerShape("b", 10, 10)]
    with pytest.raises(
        BudgetError, match=r"budget of 30 parameters .* at least 120 parameters .* least rank of 4 .*r >= 4"
    ):
        water_fill([1.0, 1.0], layers, 30, floor=4, cap=None)


def test_all_faults_of_the_arguments_come_at_once_and_name_the_layer():
    layers = [LayerShape("a", 4, 4), LayerShape("b", 4, 4)]
    with pytest.raises(ConfigError) as caught:
        water_fill([float("nan"), -1.0], layers, 64, floor=3, cap=2)
    text = str(caught.value)
    assert len(caught.value.faults) == 3
    assert "layer a: share nan" in text
    assert "layer b: share -1.0" in text
    assert "cap 2 is below 3" in text


@pytest.mark.parametrize(
    ("shares", "floor", "cap", "message"),
    [([1.0], 0, None, "1 shares for 2 layers"), ([0.0, 0.0], 0, None, "every share is 0"), ([1, 1], -1, 4, "floor -1")],
)
def test_arguments_without_sense_are_refused(shares, floor, cap, message):
    with pytest.raises(ConfigError, match=message):
        water_fill(shares, [LayerShape("a", 4, 4), LayerShape("b", 4, 4)], 64, floor=floor, cap=cap)
