import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.report.words import duration, facts, figure, plain, shortened, with_verification


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (331776, "331,776"),
        (8.0, "8"),
        (0.93124, "0.9312"),
        (1.2e-7, "1.2e-07"),
        (123456.7, "123,457"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (1e300, "1.000e+300"),
    ],
)
def test_a_figure_reads_as_people_write_it(value: float, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.421, "0.42 s"),
        (9.99, "10 s"),
        (38.4, "38 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
        (12_000, "3 h 20 min"),
        (math.nan, "nan"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_shares_and_times_are_known_by_their_keys() -> None:
    assert plain(0.7345, "test_accuracy") == "73.45%"
    assert plain(0.1305, "majority_share") == "13.05%"
    assert plain(125.0, "seconds") == "2 min 5 s"
    assert plain(0.5, "loss") == "0.5"
    assert plain(None) == "–"
    assert plain(True) == "yes"
    assert plain([1, 2]) == "1, 2"
    assert plain([]) == "none"


def test_nested_values_become_lines_with_their_path() -> None:
    lines = facts({"a_b": {"c": 1, "d": None}, "e": [{"f": 2}, 3], "seconds": 61})
    assert lines == [("a b · c", "1"), ("a b · d", "–"), ("e 1 · f", "2"), ("e 2", "3"), ("seconds", "1 min 1 s")]


def test_a_verification_does_not_hide_what_the_export_knows() -> None:
    inner = {"logit_error": None, "update_error": 1e-7}
    flat = with_verification({"layout": "uniform", "logit_error": 2e-7, "verification": inner})
    assert flat == {"layout": "uniform", "logit_error": 2e-7, "update_error": 1e-7}
    flat = with_verification({"logit_error": None, "verification": {"logit_error": 3e-7}})
    assert flat == {"logit_error": 3e-7}
    assert with_verification({"layout": "merged", "verification": None}) == {"layout": "merged"}


@given(st.text(min_size=1), st.integers(1, 30))
def test_a_shortened_text_keeps_its_end(text: str, length: int) -> None:
    short = shortened(text, length)
    assert len(short) <= length
    assert text.endswith(short.removeprefix("…"))


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_number_has_a_figure_and_a_duration(value: float) -> None:
    assert figure(value)
    assert duration(abs(value))
