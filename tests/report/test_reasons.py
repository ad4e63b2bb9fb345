from pathlib import Path

import pytest

from rankwise.report.course import Gallery
from rankwise.report.files import RankChange, read_run
from rankwise.report.reasons import reason_galleries, told
from tests.report import events
from tests.report.test_course import even_plan, written
from tests.report.test_report import report


def galleries(folder: Path, lines: list[events.Line]) -> dict[str, Gallery]:
    run = read_run(written(folder, even_plan(), lines))
    return {gallery.identity: gallery for gallery in reason_galleries(run)}


def change(detail: object) -> RankChange:
    return RankChange.model_validate({"step": 1, "layer": "h.0.q", "from": 2, "to": 2, "detail": detail})


def test_both_terms_of_every_round_are_drawn(tmp_path: Path) -> None:
    found = galleries(tmp_path, events.ab_lora(even_plan()))
    assert list(found) == ["drop", "solo"]
    assert [picture.caption for picture in found["drop"].pictures] == [
        f"Round {number}, after step {50 * number}: 1 lower, 1 higher" for number in (1, 2, 3)
    ]
    chart = found["drop"].pictures[0].chart
    assert "h.0.q: drop 0.045 (0.01 to 0.08), lost rank 0" in chart
    assert "h.3.v: drop 0.045 (0.01 to 0.08), gained rank 8" in chart
    assert "h.1.q: solo -0.0039 (-0.007 to 0) (1 not finite)" in found["solo"].pictures[0].chart
    assert found["drop"].high == "0.075"  # the mean of 0.03 to 0.12: the last layer, of 10 ranks by round 3


def test_of_many_rounds_eight_are_drawn_and_that_is_said(tmp_path: Path) -> None:
    found = galleries(tmp_path, events.ab_lora(even_plan(), rounds=12))
    assert len(found["solo"].pictures) == 8
    assert found["solo"].sentence.endswith("8 of 12 rounds.")


def test_a_layer_without_a_finite_score_is_an_empty_cell(tmp_path: Path) -> None:
    detail = {"slots": [0], "drop": [None], "solo": [None], "importance": [None], "pruned": [], "added": []}
    lines = events.event(5, "prune", "why", {"round": 1}, {"h.0.q": (1, 1)}, {"h.0.q": detail})
    found = galleries(tmp_path, lines)
    assert found["drop"].pictures[0].chart.count('class="cell zero"') == 8
    assert "h.0.q: drop – (1 not finite)" in found["drop"].pictures[0].chart
    assert "h.0.v: not scored" in found["drop"].pictures[0].chart


def test_copies_are_counted_by_layer_though_no_rank_moves(tmp_path: Path) -> None:
    found = galleries(tmp_path, events.beamlora(even_plan(), resets=4))
    assert list(found) == ["copies"]
    assert "6 ranks were overwritten in 3 resets" in found["copies"].sentence
    assert [picture.caption for picture in found["copies"].pictures] == [
        "After step 10: 2 in 1 layers",
        "After step 20: 2 in 1 layers",
        "After step 30: 2 in 1 layers",
    ]
    assert "h.0.q: ranks 2, 3 became copies of ranks 0, 1" in found["copies"].pictures[0].chart


def test_rounds_show_which_blocks_they_drew_and_the_open_one(tmp_path: Path) -> None:
    found = galleries(tmp_path, events.xgblora(even_plan(), rounds=4, ended=False))
    assert list(found) == ["rounds"]
    chart = found["rounds"].pictures[0].chart
    assert "round 1, h 0: 2 layers, norm 0.707" in chart
    assert "round 4, h 3: 2 layers, no booster kept" in chart
    assert chart.count('class="cell') == 4
    assert (found["rounds"].low, found["rounds"].high) == ("0.24", "0.71")


def test_other_details_are_told_as_they_are() -> None:
    assert told(change(None)) == ""
    assert told(change({"booster_norm": 0.25, "accumulated_rank": 4})) == "booster norm 0.25, accumulated rank 4"
    assert told(change("a word")) == "a word"
    scores = {"slots": [0, 1], "drop": [0.5, 0.25], "solo": [0.1, 0.2], "importance": [0.6, 0.45], "pruned": [1]}
    assert told(change(scores)) == (
        "2 ranks scored, drop 0.38 (0.25 to 0.5), solo 0.15 (0.1 to 0.2), lowest importance 0.45, lost rank 1"
    )


@pytest.mark.parametrize("detail", [[1, 2], {"drop": "x", "solo": 3}, {"drop": [{}]}, {"sources": ["a"]}, True, 1.5])
def test_details_of_a_later_version_are_no_fault(tmp_path: Path, detail: object) -> None:
    lines = events.event(5, "prune", "why", {"new": 1.0}, {"h.0.q": (8, 7)}, {"h.0.q": detail})
    page = report(written(tmp_path, even_plan(), lines))
    assert "1 rank change during training" in page.texts
