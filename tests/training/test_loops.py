"""Trainer, SFTTrainer and a bare Accelerate loop train the same session to the same losses."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise.export.live import computed_logits
from rankwise.training.session import Session
from tests.support.models import tiny_llama
from tests.training.jobs import Job, Rows, new_session, tokenizer, trainer_arguments

STEPS = 8
EOS = 2
ROWS = 4
"""One batch holds all rows, so that every loop sees the same batch in every step, in whatever order."""


def tokens() -> Tensor:
    rows = Rows(ROWS).tokens
    return torch.cat([rows, torch.full((len(rows), 1), EOS)], dim=1)


RATES = {
    "gora": 2e-2,
    "gora lora-rite": 3e-4,
    "lora-ga lora-pro": 1e-2,
    "gora ggpo": 2e-2,
    "rora mgpo": 2e-2,
    "ab-lora": 2e-2,
    "sora": 5e-2,
    "beamlora": 5e-2,
    "xgblora": 5e-2,
}
"""By recipe, a rate at which the rule of the rows is learned in a few steps."""
FALLS = {"xgblora": 0.05}
"""How far the loss must fall, where it is not 0.1: boosters of rank 1 in half of the blocks learn slowly."""
OTHERS = [recipe for recipe in RATES if recipe != "gora"]


def options(folder: str, recipe: str) -> dict[str, Any]:
    job = Job(folder=folder, method=recipe, steps=STEPS, save_steps=100, learning_rate=RATES[recipe])
    return {
        **trainer_arguments(job),
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
    }


def session_for(recipe: str, losses: list[float]) -> tuple[Session, Any]:
    session = new_session(Job(folder="", method=recipe, dropout=0.0))
    keep = session.callback(
        on_event=lambda event: losses.append(event.values["loss"]) if "loss" in event.values else None
    )
    return session, keep


def with_trainer(folder: str, recipe: str) -> tuple[Session, list[float]]:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    losses: list[float] = []
    session, callback = session_for(recipe, losses)
    args = TrainingArguments(**options(folder, recipe))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens()]
    made = Trainer(
        session.model,
        args,
        train_dataset=rows,
        optimizers=session.optimizers(args, STEPS),
        callbacks=[callback],
    )
    made.remove_callback(PrinterCallback)
    made.train()
    return session, losses


def with_sft(folder: str, recipe: str) -> tuple[Session, list[float]]:
    """From text, tokenized by TRL, which appends the end-of-text token itself."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    losses: list[float] = []
    session, callback = session_for(recipe, losses)
    args = SFTConfig(**options(folder, recipe), bf16=False, activation_checkpointing=False, max_length=16)
    texts = [" ".join(str(int(token)) for token in row[:-1]) for row in tokens()]
    made = SFTTrainer(
        session.model,
        args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        optimizers=session.optimizers(args, STEPS),
        callbacks=[callback],
    )
    made.remove_callback(PrinterCallback)
    made.train()
    return session, losses


def with_accelerate(folder: str, recipe: str) -> tuple[Session, list[float]]:
    from accelerate import Accelerator
    from transformers import TrainingArguments

    args = TrainingArguments(**options(folder, recipe))
    accelerator = Accelerator(cpu=True)
    session, _ = session_for(recipe, [])
    optimizer, scheduler = session.optimizers(args, STEPS)
    model, optimizer, scheduler = accelerator.prepare(session.model, optimizer, scheduler)
    model.train()
    session.begin(optimizer, STEPS)
    losses = []
    for step in range(1, STEPS + 1):
        session.before_step(step)
        loss = model(input_ids=tokens(), labels=tokens()).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
        session.before_optimizer_step(step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        session.after_step(step)
        losses.append(float(loss.detach()))
        session.logged(step, {"loss": losses[-1], "grad_norm": float(norm)})
    session.end(STEPS)
    return session, losses


LOOPS = {"trainer": with_trainer, "sft": with_sft, "accelerate": with_accelerate}


@cache
def trained(loop: str, recipe: str = "gora") -> tuple[Session, list[float]]:
    return LOOPS[loop](mkdtemp(prefix=f"{loop}-"), recipe)


@pytest.mark.parametrize("recipe", RATES)
@pytest.mark.parametrize("loop", LOOPS)
def test_the_loss_goes_down_and_the_guard_is_content(loop: str, recipe: str):
    session, losses = trained(loop, recipe)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - FALLS.get(recipe, 0.1)
    assert session.health.status == "passed"
    assert session.step == STEPS


@pytest.mark.parametrize("recipe", RATES)
@pytest.mark.parametrize("loop", ["sft", "accelerate"])
def test_every_loop_gives_trainers_losses(loop: str, recipe: str):
    assert trained(loop, recipe)[1] == pytest.approx(trained("trainer", recipe)[1], abs=2e-4)


def test_the_trained_session_exports_a_verified_plain_adapter(tmp_path: Path):
    session, _ = trained("trainer")
    session.model.eval()
    batch = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    report = session.export(tmp_path / "adapter", batch=batch)
    check = next(check for check in session.health.checks if check.id == "export")
    assert check.status == "passed"
    assert check.measured is not None
    assert check.measured <= 1e-5
    assert report is not None
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.rsplit(".", 2)[-2] for name in stored} == {"lora_A", "lora_B"}

    report = session.export(tmp_path / "by default")  # on a row of the training
    assert report.logit_error is not None
    assert report.logit_error <= 1e-5

    from peft import PeftModel

    served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(served(**batch).logits, session.model(**batch).logits, atol=1e-5)


SCRIPT = """
import json, sys, warnings
sys.modules["rankwise"] = None  # whoever imports it fails
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
root, recipes = sys.argv[1], sys.argv[2:]
errors = {}
for recipe in recipes:
    stored = load_file(f"{root}/{recipe}.safetensors")
    expected = stored.pop("logits")
    base = LlamaForCausalLM.from_pretrained(root + "/base")
    with torch.no_grad():
        before = base.eval()(**stored).logits
        logits = PeftModel.from_pretrained(base, f"{root}/{recipe}").eval()(**stored).logits
    errors[recipe] = [float((found - expected).abs().max()) for found in (before, logits)]
print(json.dumps(errors))
"""


def test_compositions_export_to_plain_adapters_that_stock_peft_computes_alike(tmp_path: Path):
    """In an interpreter that cannot import rankwise."""
    tiny_llama().save_pretrained(tmp_path / "base")
    batch = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    for recipe in OTHERS:
        session, _ = trained("trainer", recipe)
        report = session.export(tmp_path / recipe, batch=batch)
        assert report.logit_error is not None
        assert report.logit_error <= 1e-5
        save_file({**batch, "logits": computed_logits(session.model, batch)}, tmp_path / f"{recipe}.safetensors")
        stored = load_file(tmp_path / recipe / "adapter_model.safetensors")
        assert {name.rsplit(".", 2)[-2] for name in stored} == {"lora_A", "lora_B"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(tmp_path), *OTHERS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert errors.keys() == set(OTHERS)
    for before, after in errors.values():
        assert before > 1e-2, "the adapter must move the logits"
        assert after <= 1e-5


def test_an_export_before_any_forward_pass_says_that_logits_were_not_compared(tmp_path: Path):
    session = new_session(Job(folder=""))
    report = session.export(tmp_path / "adapter")
    check = next(check for check in session.health.checks if check.id == "export")
    assert report.logit_error is None
    assert "logits were not compared: there was no batch." in report.notes
    assert "logits were not compared (give batch= for that)" in check.message
