"""Methods that move ranks, on the demo's real task: the log says what became of them, stock PEFT serves it; minutes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rankwise.workflows import train as train_module
from rankwise.workflows.config import RunConfig
from rankwise.workflows.demo import demo_config
from tests.workflows.test_demo_compositions import GLOSSES, HEAD_ALONE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

METHODS: dict[str, dict[str, Any]] = {
    "ab-lora": {"rounds": 3, "sequences": 16},
    "sora": {"target_density": 0.5},
    "beamlora": {},
    "xgblora": {},
}
LEARNING_RATES = {"xgblora": 5e-3}
"""Where it is not plain LoRA's of the demo: a booster has few steps, in a third of the blocks."""
LAYOUTS = ("uniform", "compact")


def scheduled(method: str, folder: Path) -> RunConfig:
    """The demo's run file with another method in the place of GoRA."""
    values = demo_config("lora", folder).model_dump(mode="json", exclude_unset=True)
    values |= {"method": method, method: METHODS[method]}
    values["data"] = {**values["data"], "validation": 0.05}
    training = values["training"]
    values["training"] = {**training, "learning_rate": LEARNING_RATES.get(method, training["learning_rate"])}
    return RunConfig.model_validate(values)


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_the_task_tells_its_changes_and_is_served_in_both_layouts(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scheduled(method, tmp_path / "run")
    batch = AutoTokenizer.from_pretrained(config.model)(list(GLOSSES), padding=True, return_tensors="pt")
    live: list[torch.Tensor] = []
    ranks: dict[str, int] = {}
    through = train_module._Run.through

    def watched(run: Any, *arguments: Any) -> Any:
        result = through(run, *arguments)
        with torch.inference_mode():
            live.append(run.session.model.eval()(**batch).logits)
        ranks.update(run.session.schedule.live_ranks() or run.session.plan.ranks)
        run.session.export(tmp_path / "compact", layout="compact")
        return result

    monkeypatch.setattr(train_module._Run, "through", watched)
    result = train_module.train(config)
    told = json.loads((result.folder / "rankwise.json").read_text(encoding="utf-8"))["result"]
    assert told["test_accuracy"] > HEAD_ALONE > 3 * told["majority_share"]

    changes = [json.loads(line) for line in (result.folder / "ranks.jsonl").read_text().splitlines()]
    assert [line for line in changes if "layer" not in line], "no event was told"
    found = dict.fromkeys(ranks, 0) if method == "xgblora" else dict(result.plan.ranks)
    for line in changes:
        if "layer" in line:
            assert line["from"] == found[line["layer"]]
            found[line["layer"]] = line["to"]
    assert found == ranks

    for layout, folder in zip(LAYOUTS, (result.folder, tmp_path / "compact"), strict=True):
        base = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=live[0].shape[1])
        served = PeftModel.from_pretrained(base, str(folder)).eval()
        with torch.inference_mode():
            error = (served(**batch).logits - live[0]).abs().max() / live[0].abs().max()
        assert error <= 1e-5, layout
