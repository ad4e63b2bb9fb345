"""Compositions of methods on the demo's real task, each served by stock PEFT afterwards; minutes each."""

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

pytestmark = pytest.mark.slow

HEAD_ALONE = 0.489
"""What the demo's head reaches without an adapter, in as many steps."""

GLOSSES = (
    "a formal proclamation issued by the pope",
    "of or relating to the somatosenses",
    "a small boat that is rowed by one person",
    "move quickly on foot",
)


def composed(methods: list[str], folder: Path, lora_alpha: float, learning_rate: float) -> RunConfig:
    """The demo's run file with other methods in the place of GoRA."""
    values = demo_config("gora", folder).model_dump(mode="json", exclude_unset=True)
    values |= {"method": methods, "lora_alpha": lora_alpha}
    values["training"] = {**values["training"], "learning_rate": learning_rate}
    return RunConfig.model_validate(values)


@pytest.mark.parametrize(
    ("methods", "lora_alpha", "learning_rate"),
    [
        (["gora", "lora-rite"], 0.6, 2e-3),
        (["lora-ga", "lora-pro"], 16.0, 1e-3),
        (["gora", "ggpo"], 6.0, 2e-3),
        (["rora", "mgpo"], 6.0, 2e-3),
    ],
)
def test_it_learns_the_task_and_stock_peft_computes_its_logits(
    methods: list[str],
    lora_alpha: float,
    learning_rate: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = composed(methods, tmp_path / "run", lora_alpha, learning_rate)
    batch = AutoTokenizer.from_pretrained(config.model)(list(GLOSSES), padding=True, return_tensors="pt")
    live: list[torch.Tensor] = []
    through = train_module._Run.through

    def watched(run: Any, *arguments: Any) -> Any:
        result = through(run, *arguments)
        with torch.inference_mode():
            live.append(run.session.model.eval()(**batch).logits)
        return result

    monkeypatch.setattr(train_module._Run, "through", watched)
    result = train_module.train(config)
    told = json.loads((result.folder / "rankwise.json").read_text(encoding="utf-8"))["result"]
    assert told["test_accuracy"] > HEAD_ALONE > 3 * told["majority_share"]

    base = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=live[0].shape[1])
    served = PeftModel.from_pretrained(base, str(result.folder)).eval()
    with torch.inference_mode():
        error = (served(**batch).logits - live[0]).abs().max() / live[0].abs().max()
    assert error <= 1e-5
