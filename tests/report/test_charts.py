import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rankwise.report.charts import Line, importance_bars, line_chart, stacked_bar
from rankwise.report.grid import arrange
from rankwise.report.heat_map import heat_map
from rankwise.report.svg import frame, level, node, thin, ticks

SVG = "{http://www.w3.org/2000/svg}"
finite = st.floats(-1e12, 1e12)


def parsed(markup: str) -> ET.Element:
    return ET.fromstring(markup)


def draw(values: dict[str, float]) -> ET.Element:
    (panel,) = arrange(values)
    scale, hints = (min(values.values()), max(values.values())), {name: name for name in values}
    return parsed(heat_map("m", "Ranks", panel, values, scale=scale, text=lambda value: f"{value:g}", hints=hints))


def test_text_and_attributes_are_escaped_once() -> None:
    markup = node("text", "<b> & 'q'", node("title", "a<b"), class_='"x"')
    element = parsed(markup)
    assert element.text == "<b> & 'q'"
    assert element.attrib == {"class": '"x"'}
    assert element[0].text == "a<b"


def test_a_picture_names_and_describes_itself() -> None:
    element = parsed(frame("i", "Loss", "From 3 to 1.", 10, 20))
    assert element.get("role") == "img"
    labels = str(element.get("aria-labelledby")).split()
    assert [child.get("id") for child in element[:2]] == labels
    assert [child.text for child in element[:2]] == ["Loss", "From 3 to 1."]


@given(finite, finite)
@example(0.0, 5e-324)
def test_ticks_cover_the_range_in_equal_steps(first: float, second: float) -> None:
    low, high = sorted((first, second))
    places = ticks(low, high)
    slack = 1e-9 * max(abs(low), abs(high), 1e-300) + (places[1] - places[0]) * 1e-6
    assert places[0] <= low + slack
    assert places[-1] >= high - slack
    assert 2 <= len(places) <= 8


def test_ticks_of_a_hand_worked_range() -> None:
    assert ticks(0.0, 4.0) == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert ticks(0.85, 3.6) == (0.0, 1.0, 2.0, 3.0, 4.0)


@given(st.lists(finite, min_size=1, max_size=50), st.integers(1, 60))
def test_thinning_keeps_every_reading_in_the_mean(values: list[float], limit: int) -> None:
    points = [(float(place), value) for place, value in enumerate(values)]
    short = thin(points, limit)
    assert len(short) <= limit
    if len(values) <= limit:
        assert short == points
    run = math.ceil(len(values) / limit)
    if len(values) % run == 0:
        assert sum(y for _, y in short) / len(short) == pytest.approx(sum(values) / len(values), rel=1e-6, abs=1e-3)


def test_the_color_scale_ends_where_the_values_end() -> None:
    assert [level(value, 4, 32) for value in (4, 18, 32)] == [0, 4, 8]
    assert level(8, 8, 8) == 4
    assert level(math.nan, 0, 1) == 0


def test_a_heat_map_has_one_cell_a_layer_and_marks_rank_0() -> None:
    values = {"h.0.q": 2.0, "h.0.v": 8.0, "h.1.q": 0.0}
    cells = [group for group in draw(values).iter(f"{SVG}g") if str(group.get("class")).startswith("cell")]
    assert [cell.findtext(f"{SVG}title") for cell in cells] == list(values)
    assert [cell.findtext(f"{SVG}text") for cell in cells] == ["2", "8", "0"]
    assert [cell.get("class") for cell in cells] == ["cell q2", "cell q8", "cell zero"]


def test_depth_runs_from_left_to_right_and_kinds_from_top_to_bottom() -> None:
    groups = draw({"h.0.q": 1.0, "h.0.v": 2.0, "h.1.q": 3.0}).iter(f"{SVG}g")
    boxes = [(float(box.get("x", 0)), float(box.get("y", 0))) for group in groups for box in group.iter(f"{SVG}rect")]
    (x0, y0), (x1, y1), (x2, y2) = boxes
    assert x0 == x1 < x2
    assert y0 == y2 < y1


def test_figures_that_do_not_fit_every_cell_are_left_out_of_all() -> None:
    values = {f"h.{i}.q": 123456.0 for i in range(60)}
    assert not any(group.findtext(f"{SVG}text") for group in draw(values).iter(f"{SVG}g"))


@given(st.dictionaries(st.from_regex(r"\A[ab]\.[0-9]{1,2}\.[qv]\Z"), st.floats(0, 1e6), min_size=1, max_size=12))
def test_any_heat_map_is_well_formed(values: dict[str, float]) -> None:
    for panel in arrange(values):
        scale, hints = (min(values.values()), max(values.values())), {name: name for name in values}
        markup = heat_map("m", "t", panel, values, scale=scale, text=str, hints=hints)
        assert sum(1 for _ in parsed(markup).iter(f"{SVG}g")) == len(panel.cells)
        assert "nan" not in markup


def test_a_reading_that_is_not_finite_is_marked_and_counted() -> None:
    markup = line_chart("l", "Loss", [Line("loss", [(1, 3.0), (2, math.nan), (3, math.inf), (4, 1.0)])])
    element = parsed(markup)
    assert sum(path.get("class") == "bad" for path in element.iter(f"{SVG}path")) == 2
    assert "2 readings not finite" in str(element.findtext(f"{SVG}desc"))


def test_a_line_of_nothing_but_nan_still_draws() -> None:
    assert len(list(parsed(line_chart("l", "Loss", [Line("loss", [(1, math.nan)])])).iter(f"{SVG}path"))) == 1


readings = st.tuples(st.integers(0, 10**6).map(float), st.floats(allow_nan=True, allow_infinity=True, width=32))


@given(st.lists(readings, min_size=1, max_size=20))
def test_any_curve_is_well_formed_and_free_of_nan_coordinates(points: list[tuple[float, float]]) -> None:
    element = parsed(line_chart("l", "t", [Line("loss", points), Line("eval", points, "marks", 1)]))
    places = [shape.get(name, "") for shape in element.iter() for name in ("d", "x", "y", "cx", "cy", "x1", "y1")]
    assert not any(word in place for place in places for word in ("nan", "inf"))


def test_a_stacked_bar_is_as_wide_as_its_shares() -> None:
    element = parsed(stacked_bar("b", "Budget", [("q", 250.0), ("v", 500.0)], 1000.0))
    first, second = element.iter(f"{SVG}rect")
    assert float(first.get("x", -1)) == 0.0
    assert float(second.get("x", -1)) == 250.0
    assert float(second.get("width", -1)) == pytest.approx(500.0, abs=2)
    assert "v 500 (50.0%)" in str(element.findtext(f"{SVG}desc"))


def test_parts_beyond_the_colors_share_the_last_one() -> None:
    element = parsed(stacked_bar("b", "t", [(str(i), 1.0) for i in range(12)], 12.0))
    assert [rect.get("class") for rect in element.iter(f"{SVG}rect")][-5:] == ["c7"] * 5


def test_importance_bars_tell_the_rank_beside_the_bar() -> None:
    element = parsed(importance_bars("i", "t", [("q, block 3", 2.0, 16), ("v, block 0", 1.0, 4)]))
    widths = [float(bar.get("width", 0)) for bar in element.iter(f"{SVG}rect")]
    assert widths[0] == 2 * widths[1]
    assert {"rank 16", "rank 4"} <= {text.text for text in element.iter(f"{SVG}text")}
