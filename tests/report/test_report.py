import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rankwise.errors import ArtifactError
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import LayerShape
from rankwise.report.report import write_report
from tests.report import sample

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Every element with its attributes and text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open[-1] != "style":
            self.texts.append(" ".join(data.split()))

    def all(self, tag: str, class_: str | None = None) -> Iterator[dict[str, str]]:
        for name, attributes in self.elements:
            if name == tag and (class_ is None or class_ in attributes.get("class", "").split()):
                yield attributes

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for attributes in self.all("section")]


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_finished_run_shows_every_section(tmp_path: Path) -> None:
    page = report(sample.write_run(tmp_path))
    assert page.sections == ["ranks", "budget", "training", "importance", "health", "export", "layers", "record"]
    assert "all-MiniLM-L6-v2" in page.texts
    assert {"finished", "73.45%", "majority class 13.05%", "236,160", "331,776"} <= set(page.texts) | {
        word for text in page.texts for word in text.split()
    }
    assert sum(1 for _ in page.all("g", "cell")) == 2 * 36  # ranks and importance
    assert {"Loss", "Accuracy", "Learning rate", "Gradient norm"} <= set(page.texts)
    assert "max_steps: 250" in " ".join(page.texts)


def test_the_page_is_whole_without_script_or_outside_resource(tmp_path: Path) -> None:
    page = report(sample.write_run(tmp_path))
    assert not {"script", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    assert not [value for _, attributes in page.elements for name, value in attributes.items() if name == "src"]
    assert {attributes["href"] for tag, attributes in page.elements if "href" in attributes} == {"data:,", "#main"}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert "url(" not in text


def test_pictures_and_ids_serve_a_screen_reader(tmp_path: Path) -> None:
    page = report(sample.write_run(tmp_path))
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    pictures = list(page.all("svg"))
    assert len(pictures) == 9  # two heat maps, bars, budget, four curves, time
    for picture in pictures:
        assert picture["role"] == "img"
        assert set(picture["aria-labelledby"].split()) <= set(identities)
    assert all(attributes.get("aria-label") for attributes in page.all("div", "scroll"))


def test_equal_files_give_equal_bytes(tmp_path: Path) -> None:
    first = write_report(sample.write_run(tmp_path / "a")).read_bytes()
    again = write_report(tmp_path / "a").read_bytes()
    assert first == again == write_report(sample.write_run(tmp_path / "b")).read_bytes()


def test_nothing_but_the_report_is_left_in_the_folder(tmp_path: Path) -> None:
    before = {path.name for path in sample.write_run(tmp_path).iterdir()}
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert {path.name for path in tmp_path.iterdir()} == before | {"report.html"}


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "</style><script>alert(1)</script>\"'&{{ 7*7 }}"
    shapes = [LayerShape(f"h.0.{evil}", 8, 8), LayerShape(f"{evil}.q", 8, 8)]
    plan = RankPlan.from_shapes(
        shapes, [4, 2], r=4, lora_alpha=8, importance=[2.0, 1.0], reasons=[evil, evil], notes=[evil]
    )
    sample.write_run(tmp_path, plan, "failed")
    manifest = sample.manifest(plan, "failed")
    manifest |= {"config": {"model": evil, "method": [evil], evil: evil}, "result": {evil: evil}, "error": evil}
    manifest |= {"versions": {evil: evil}, "data": {evil: {evil: evil}}, "timings": {evil: 3.0}}
    manifest["export"] = {"verdicts": [{"consumer": evil, "status": evil, "reason": evil}]}
    sample.write_json(tmp_path / "rankwise.json", manifest)
    checks = [{"id": evil, "stage": "during", "status": "failed", "measured": evil, "message": evil, "advice": evil}]
    health = {"format": "rankwise-health", "version": 1, "status": "failed", "checks": checks}
    sample.write_json(tmp_path / "health.json", health)
    about = {"step": 1, "kind": evil, "reason": evil}
    change = about | {"layer": shapes[0].name, "from": 4, "to": 3, "detail": {evil: evil}}
    sample.write_lines(tmp_path / "ranks.jsonl", [about | {"figures": {evil: 1.0}}, change])
    page = report(tmp_path)
    assert not list(page.all("script"))
    assert sum(1 for _ in page.all("style")) == 1
    assert sum(evil in text for text in page.texts) >= 20


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_run_without_anything_but_its_manifest_renders(tmp_path: Path, status: str) -> None:
    body = {"format": "rankwise-run", "version": 1, "status": status, "config": {"model": "tiny", "method": "gora"}}
    sample.write_json(tmp_path / "rankwise.json", body)
    page = report(tmp_path)
    assert page.sections == ["problems", "record"]
    assert status in page.texts


def test_a_failed_run_opens_with_what_failed_and_what_to_do(tmp_path: Path) -> None:
    page = report(sample.write_run(tmp_path, status="failed"))
    assert page.sections[0] == "problems"
    start = page.texts.index("The run failed.")
    assert page.texts[start + 1 : start + 4] == [
        "finite-gradients",
        ": Gradients that were not finite.",
        "Lower the learning rate.",
    ]


def test_a_line_cut_off_by_a_kill_is_left_out_while_the_run_goes_on(tmp_path: Path) -> None:
    sample.write_run(tmp_path, status="running")
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 255, "lo')
    assert "training" in report(tmp_path).sections


def test_a_cut_off_line_of_a_finished_run_is_damage(tmp_path: Path) -> None:
    sample.write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 255, "lo')
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl, line 56 is damaged: not JSON"):
        write_report(tmp_path)


def test_a_step_trained_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    sample.write_run(tmp_path)
    lines = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 2, "loss": 7.0}]
    sample.write_lines(tmp_path / "metrics.jsonl", lines)
    assert "training loss: 9 at step 1, 7 at step 2." in report(tmp_path).texts


@pytest.mark.parametrize("value", ["NaN", '"nan"', '"-inf"'])
def test_a_loss_that_became_nan_is_said(tmp_path: Path, value: str) -> None:
    sample.write_run(tmp_path, status="failed")
    log = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": ' + value + "}\n"
    (tmp_path / "metrics.jsonl").write_text(log, encoding="utf-8")
    page = report(tmp_path)
    assert any("1 reading not finite" in text for text in page.texts)
    assert sum(1 for _ in page.all("path", "bad")) == 1


def test_accuracies_come_first_with_their_majority_share_beside_them(tmp_path: Path) -> None:
    sample.write_run(tmp_path)
    page = report(tmp_path)
    labels = [text for text in page.texts if text in ("steps", "train loss", "eval loss", "test accuracy")]
    assert labels[:4] == ["test accuracy", "eval loss", "train loss", "steps"]
    assert page.texts[page.texts.index("test accuracy") + 1 :][:2] == ["73.45%", "majority class 13.05%"]


def test_a_language_model_shows_its_token_accuracy(tmp_path: Path) -> None:
    sample.write_run(tmp_path)
    lines = [
        {"step": step, "loss": 2.0, "mean_token_accuracy": 0.5, "eval_mean_token_accuracy": 0.4} for step in (1, 2)
    ]
    sample.write_lines(tmp_path / "metrics.jsonl", lines)
    page = report(tmp_path)
    assert "Token accuracy" in page.texts
    assert "Accuracy" not in page.texts


def test_rank_changes_are_listed_and_decide_the_final_ranks(tmp_path: Path) -> None:
    plan = sample.uneven_plan(sample.bert_shapes())
    sample.write_run(tmp_path, plan)
    first = plan.layers[0]
    change = {"step": 40, "layer": first.name, "from": first.rank, "to": 12, "reason": "score"}
    sample.write_lines(tmp_path / "ranks.jsonl", [change])
    page = report(tmp_path)
    assert "1 rank change during training" in page.texts
    assert "planned" in page.texts
    used = plan.parameters + (12 - first.rank) * first.shape.cost
    assert f"{used:,}" in page.texts


def test_a_plan_without_importance_has_no_importance_section(tmp_path: Path) -> None:
    plan = RankPlan.from_shapes(sample.bert_shapes(2), [8] * 12, r=8, lora_alpha=16)
    page = report(sample.write_run(tmp_path, plan))
    assert "importance" not in page.sections
    assert any("all of rank 8" in text for text in page.texts)


def test_a_plan_over_its_budget_is_shown_as_such(tmp_path: Path) -> None:
    plan = sample.uneven_plan(sample.bert_shapes())
    over = replace(plan, budget=plan.parameters * 4 // 5, overspend_allowed=True)
    assert "over budget by 25.0 %" in report(sample.write_run(tmp_path / "over", over)).texts
    assert not any("over budget" in text for text in report(sample.write_run(tmp_path / "within", plan)).texts)


@pytest.mark.parametrize("name", ["rankwise.json", "plan.json", "metrics.jsonl", "health.json"])
def test_a_finished_run_must_have_its_files(tmp_path: Path, name: str) -> None:
    sample.write_run(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")) as caught:
        write_report(tmp_path)
    assert "missing" in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["rankwise.json", "plan.json", "metrics.jsonl", "ranks.jsonl", "health.json"])
@pytest.mark.parametrize("damage", [b"{", b"[1, 2]\n", b'{"format": "other"}\n', b"\xff\xfe\x00"])
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path: Path, name: str, damage: bytes) -> None:
    sample.write_run(tmp_path)
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        write_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"rankwise.json"}
    assert not (tmp_path / "report.html").exists()


def test_all_faults_of_a_file_are_in_one_error(tmp_path: Path) -> None:
    body = {"format": "rankwise-run", "version": 2, "status": "done", "timings": {"load": "fast"}}
    sample.write_json(tmp_path / "rankwise.json", body)
    with pytest.raises(ArtifactError) as caught:
        write_report(tmp_path)
    assert all(word in str(caught.value) for word in ("version:", "status:", "timings.load:"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not the output folder of a rankwise run"):
        write_report(tmp_path / "nowhere")


def test_keys_of_a_later_version_are_no_fault(tmp_path: Path) -> None:
    sample.write_run(tmp_path)
    body = json.loads((tmp_path / "rankwise.json").read_text(encoding="utf-8"))
    sample.write_json(tmp_path / "rankwise.json", body | {"new": {"key": [1]}})
    assert report(tmp_path).sections[0] == "ranks"
