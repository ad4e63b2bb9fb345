from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.methods.sora import SoRA
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import LayerShape
from rankwise.report.course import course_gallery, driving_curves, moments, spread
from rankwise.report.files import Run, read_run
from rankwise.report.summary import events_sentence, layers_moved, live_totals
from rankwise.training.attach import attach
from tests.report import events, sample
from tests.report.test_report import Page, report


def even_plan(blocks: int = 4, rank: int = 8) -> RankPlan:
    names = [f"h.{block}.{kind}" for block in range(blocks) for kind in ("q", "v")]
    return RankPlan.from_shapes([LayerShape(name, 16, 16) for name in names], [rank] * len(names), r=8, lora_alpha=8)


def written(folder: Path, plan: RankPlan, lines: list[events.Line], status: str = "finished") -> Path:
    sample.write_run(folder, plan, status)
    sample.write_lines(folder / "ranks.jsonl", lines)
    return folder


def run_of(folder: Path, lines: list[events.Line], status: str = "finished") -> Run:
    return read_run(written(folder, even_plan(), lines, status))


def test_layers_belong_to_the_event_before_them(tmp_path: Path) -> None:
    lines = events.event(5, "prune", "why", {"density": 0.5}, {"h.0.q": (8, 7), "h.0.v": (8, 8)})
    found = run_of(tmp_path, [*lines, *events.event(9, "stage", "end", {}, {})]).events
    assert [(one.step, one.kind, [line.layer for line in one.layers]) for one in found] == [
        (5, "prune", ["h.0.q", "h.0.v"]),
        (9, "stage", []),
    ]
    assert [line.layer for line in found[0].moved] == ["h.0.q"]
    assert layers_moved(found[0]) == "1 lower, 1 at the same rank"
    assert layers_moved(found[1]) == "none"


def test_the_best_checkpoints_ranks_are_an_event_of_their_own(tmp_path: Path) -> None:
    lines = events.event(250, "prune", "why", {}, {"h.0.q": (8, 3)})
    run = run_of(tmp_path, [*lines, *events.best("h.0.q", 3, 6), *events.best("h.1.q", 8, 7)])
    assert [(one.kind, len(one.layers)) for one in run.events] == [("prune", 1), ("best", 2)]
    assert (run.start_ranks["h.0.q"], run.final_ranks["h.0.q"], run.final_ranks["h.1.q"]) == (8, 6, 7)
    assert events_sentence(run) == "2 events at step 250: 1 prune, 1 best; 2 lower than at the start, of 8 layers."
    assert "checkpoint-50 is the best, and its factors were loaded" in report(tmp_path).texts


def test_a_run_may_begin_with_a_take_back(tmp_path: Path) -> None:
    run = run_of(tmp_path, events.best("h.0.q", 8, 6))
    assert [moment.ranks["h.0.q"] for moment in moments(run)] == [8, 6]


def test_layers_that_no_round_drew_have_no_rank(tmp_path: Path) -> None:
    run = run_of(tmp_path, events.xgblora(even_plan(), rounds=3))
    assert set(run.start_ranks.values()) == {0}
    assert [run.final_ranks[f"h.{block}.q"] for block in range(4)] == [2, 2, 2, 0]
    assert live_totals(run) == {"live ranks": (0, 12), "parameters": (0, 12 * 32)}


def test_moments_are_the_start_equal_parts_of_what_moved_and_the_end(tmp_path: Path) -> None:
    lines: list[events.Line] = []
    rank = 8
    for step, fell in ((10, 1), (20, 1), (30, 1), (40, 1), (50, 1), (60, 1), (70, 1)):
        lines += events.event(step, "prune", "why", {}, {"h.0.q": (rank, rank - fell)})
        rank -= fell
    run = run_of(tmp_path, lines)
    assert [moment.step for moment in moments(run)] == [0, 20, 30, 50, 60, 70]
    assert [moment.ranks["h.0.q"] for moment in moments(run)] == [8, 6, 5, 3, 2, 1]
    assert [moment.step for moment in moments(run, between=1)] == [0, 40, 70]
    assert all(moment.ranks["h.1.q"] == 8 for moment in moments(run))


def test_two_events_of_a_step_are_one_moment(tmp_path: Path) -> None:
    first = events.event(10, "prune", "why", {}, {"h.0.q": (8, 7)})
    run = run_of(tmp_path, [*first, *events.event(10, "stage", "end", {}, {"h.0.q": (7, 6)})])
    assert [(moment.step, moment.ranks["h.0.q"]) for moment in moments(run)] == [(0, 8), (10, 6)]


def test_events_that_only_measured_make_no_picture_of_ranks(tmp_path: Path) -> None:
    run = run_of(tmp_path, events.beamlora(even_plan()))
    assert moments(run) == ()
    assert course_gallery(run) is None
    assert run.changes == ()
    assert "no layer's rank changed" in events_sentence(run)
    assert "Live ranks" not in [picture.caption for picture in driving_curves(run)]


def test_evenly_spread_events_keep_the_first_and_the_last(tmp_path: Path) -> None:
    found = run_of(tmp_path, events.sora(even_plan())).events
    shown = spread(found, 8)
    assert len(shown) == 8
    assert (shown[0], shown[-1]) == (found[0], found[-1])
    assert list(spread(found[:3], 8)) == list(found[:3])


@pytest.mark.parametrize(("status", "last"), [("finished", "At the end, since step"), ("interrupted", "So far, after")])
def test_the_pictures_say_when_they_are_of_and_share_one_scale(tmp_path: Path, status: str, last: str) -> None:
    gallery = course_gallery(run_of(tmp_path, events.sora(even_plan()), status))
    assert gallery is not None
    captions = [picture.caption for picture in gallery.pictures]
    assert len(captions) == 6
    assert captions[0] == "At the start: 64 ranks"
    assert captions[-1].startswith(last)
    assert (gallery.low, gallery.high) == ("1", "8")
    assert "h.0.q: rank 8" in gallery.pictures[0].chart
    assert "(-1)" in gallery.pictures[1].chart


def test_figures_of_the_log_and_of_the_events_become_curves(tmp_path: Path) -> None:
    written(tmp_path, even_plan(), events.sora(even_plan()))
    log = [{"step": step, "loss": 1.0, "sora_density": 1 - step / 500, "sora_threshold": "nan"} for step in (50, 100)]
    sample.write_lines(tmp_path / "metrics.jsonl", log)
    pictures = {picture.caption: picture.chart for picture in driving_curves(read_run(tmp_path))}
    assert list(pictures) == ["Live ranks", "Share of the parameters left", "Threshold of a step", "Lambda"]
    assert "in the log: 0.9 at step 50, 0.8 at step 100." in pictures["Share of the parameters left"]
    assert "2 readings not finite" in pictures["Threshold of a step"]
    assert "in all layers: 64 at step 0" in pictures["Live ranks"]


@pytest.mark.parametrize("schedule", events.SCHEDULES)
@pytest.mark.parametrize("status", ["finished", "running", "interrupted", "failed"])
def test_a_run_of_every_schedule_shows_its_events(tmp_path: Path, schedule: str, status: str) -> None:
    plan = even_plan()
    page = report(written(tmp_path, plan, events.SCHEDULES[schedule](plan), status))
    course = ["course", "reasons", "events"]
    assert [section for section in page.sections if section in course] == course
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert all(attributes.get("aria-label") for attributes in page.all("div", "scroll"))


def test_a_run_stopped_in_the_middle_of_a_line_shows_what_was_whole(tmp_path: Path) -> None:
    written(tmp_path, even_plan(), events.sora(even_plan(), events=3), "interrupted")
    with (tmp_path / "ranks.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 90, "kind": "pru')
    assert "3 events with reason and figures" in report(tmp_path).texts


def test_a_run_without_events_says_nothing_of_them(tmp_path: Path) -> None:
    page = report(sample.write_run(tmp_path, even_plan()))
    assert not {"course", "reasons", "events"} & set(page.sections)


def test_events_without_a_plan_are_listed(tmp_path: Path) -> None:
    written(tmp_path, even_plan(), events.ab_lora(even_plan()), "failed")
    (tmp_path / "plan.json").unlink()
    page = report(tmp_path)
    assert "events" in page.sections
    assert "3 events with reason and figures" in page.texts


def test_many_events_are_folded_away_and_few_are_not(tmp_path: Path) -> None:
    def opened(count: int) -> bool:
        lines = events.sora(even_plan(), events=count)
        page = report(written(tmp_path / str(count), even_plan(), lines))
        return "open" in next(iter(page.all("details")))

    assert opened(12)
    assert not opened(13)


def test_hundreds_of_layers_stay_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    plan = RankPlan.from_shapes(sample.llama_shapes(80), [8] * 560, r=8, lora_alpha=16)
    page = report(written(tmp_path, plan, events.ab_lora(plan, rounds=20)))
    assert (tmp_path / "report.html").stat().st_size < 6e6
    assert any("The first 1000 are shown" in text for text in page.texts)
    assert sum(1 for _ in page.all("g", "cell")) == 560 * (1 + 6 + 2 * 8)  # ranks, their course, both terms of 8 rounds


def test_the_budget_of_rounds_is_that_of_the_export(tmp_path: Path) -> None:
    plan = even_plan()
    page = report(written(tmp_path, plan, events.xgblora(plan)))
    assert any("the budget holds for what is exported" in text for text in page.texts)


def test_a_real_run_of_sora_shows_its_ranks_before_during_and_after(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, pad_token_id=0, num_key_value_heads=2, **size))
    session = attach(model, SoRA(target_density=0.4), r=4, lora_alpha=8)
    steps, lines, log = 40, [], []
    optimizer, scheduler = session.optimizers(
        type("Arguments", (), {"learning_rate": 2e-2, "weight_decay": 0.0}), steps
    )
    session.begin(optimizer, steps)
    rows = torch.randint(1, 32, (4, 8))
    for step in range(1, steps + 1):
        session.before_step(step)
        session.model(input_ids=rows, labels=rows).loss.backward()
        session.before_optimizer_step(step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        session.after_step(step)
        lines += session.drain_changes()
        log.append({"step": step, "loss": 1.0, **session.figures()})
    session.end(steps)
    lines += session.drain_changes()
    live = session.schedule.live_ranks()  # type: ignore[union-attr]
    written(tmp_path, session.plan, lines)
    sample.write_lines(tmp_path / "metrics.jsonl", log)
    session.close()
    run = read_run(tmp_path)
    assert run.start_ranks == dict(session.plan.ranks)
    assert run.final_ranks == live
    assert sum(live.values()) < sum(run.start_ranks.values())
    page: Page = report(tmp_path)
    assert f"At the start: {sum(run.start_ranks.values())} ranks" in page.texts
    assert any(f": {sum(live.values())} ranks" in text and "At the end" in text for text in page.texts)
    assert {"Share of the parameters left", "Threshold of a step", "Lambda", "Live ranks"} <= set(page.texts)
