"""A budget keeps the ranks that hold the most for what they cost."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import BudgetError, ConfigError
from rankwise.ranks.shapes import LayerShape, uniform_budget
from rankwise.ranks.truncation import truncated_ranks

SQUARE = [LayerShape("a", 4, 4), LayerShape("b", 4, 4)]
UNEVEN = [LayerShape("a", 2, 2), LayerShape("b", 6, 6), LayerShape("c", 3, 2)]

spectra = st.lists(st.floats(0, 1e6), max_size=6).map(lambda values: sorted(values, reverse=True))


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(0, (0, 0)), (7, (0, 0)), (8, (1, 0)), (16, (1, 1)), (24, (1, 2)), (31, (1, 2)), (32, (2, 2)), (999, (2, 2))],
)
def test_equal_layers_by_hand(budget: int, kept: tuple[int, int]) -> None:
    assert truncated_ranks({"a": [3.0, 0.5], "b": [2.0, 1.0]}, SQUARE, budget) == dict(zip("ab", kept, strict=True))


def test_a_rank_is_weighed_by_what_it_costs() -> None:
    values = {"a": [1.0], "b": [1.5], "c": [0.0]}
    # 1 / 4 for each parameter of a, 2.25 / 12 for each of b: a first, although its singular value is smaller.
    assert truncated_ranks(values, UNEVEN, 12) == {"a": 1, "b": 0, "c": 0}
    assert truncated_ranks(values, UNEVEN, 16) == {"a": 1, "b": 1, "c": 0}


def test_what_is_left_goes_to_a_rank_that_still_fits() -> None:
    assert truncated_ranks({"a": [1.0, 0.1], "b": [3.0, 2.9], "c": [0.2]}, UNEVEN, 12 + 9) == {"a": 1, "b": 1, "c": 1}


def test_ties_keep_the_first_layer_and_nothing_is_nothing() -> None:
    assert truncated_ranks({"a": [1.0, 1.0], "b": [1.0, 1.0]}, SQUARE, 24) == {"a": 2, "b": 1}
    assert truncated_ranks({"a": [0.0], "b": []}, SQUARE, 24) == {"a": 0, "b": 0}


@given(st.tuples(spectra, spectra, spectra), st.integers(0, 120))
def test_the_budget_holds_and_no_rank_that_fits_is_left_out(
    spectrum: tuple[list[float], list[float], list[float]], budget: int
) -> None:
    values = dict(zip("abc", spectrum, strict=True))
    kept = truncated_ranks(values, UNEVEN, budget)
    costs = {shape.name: shape.cost for shape in UNEVEN}
    left = budget - sum(rank * costs[name] for name, rank in kept.items())
    assert left >= 0
    for name, rank in kept.items():
        rest = values[name][rank:]
        assert not rest or rest[0] == 0 or costs[name] > left


@given(st.tuples(spectra, spectra), st.integers(0, 100))
def test_of_layers_of_one_size_the_least_energy_is_discarded(
    spectrum: tuple[list[float], list[float]], budget: int
) -> None:
    values = dict(zip("ab", spectrum, strict=True))
    kept = truncated_ranks(values, SQUARE, budget)

    def energy(ranks: dict[str, int]) -> float:
        return sum(value**2 for name, rank in ranks.items() for value in values[name][:rank])

    possible = [
        dict(zip("ab", ranks, strict=True))
        for ranks in itertools.product(*(range(len(values[name]) + 1) for name in "ab"))
        if 8 * sum(ranks) <= budget
    ]
    assert energy(kept) == pytest.approx(max(energy(ranks) for ranks in possible))


@given(st.integers(1, 5), st.data())
def test_a_uniform_rank_is_never_exceeded(r: int, data: st.DataObject) -> None:
    values = {shape.name: data.draw(spectra) for shape in UNEVEN}
    kept = truncated_ranks(values, UNEVEN, uniform_budget(UNEVEN, r))
    assert sum(kept[shape.name] * shape.cost for shape in UNEVEN) <= uniform_budget(UNEVEN, r)


def test_numbers_whose_squares_underflow_are_still_told_apart() -> None:
    assert truncated_ranks({"a": [1e-200], "b": [2e-200]}, SQUARE, 8) == {"a": 0, "b": 1}


def test_values_that_make_no_sense_are_refused_with_their_layers() -> None:
    with pytest.raises(ConfigError) as error:
        truncated_ranks({"a": [1.0, 2.0], "c": [-1.0]}, UNEVEN, 8)
    assert [fault.split(":")[0] for fault in error.value.faults] == ["layer a", "layer b", "layer c"]
    with pytest.raises(ConfigError, match="layer a: singular values must be finite"):
        truncated_ranks({"a": [float("nan")], "b": []}, SQUARE, 8)
    with pytest.raises(BudgetError, match="the budget is -1"):
        truncated_ranks({"a": [], "b": []}, SQUARE, -1)
