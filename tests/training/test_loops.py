"""Trainer, SFTTrainer and a bare Accelerate loop train the same session to the same losses."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

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


def options(folder: str) -> dict[str, Any]:
    job = Job(folder=folder, steps=STEPS, save_steps=100, learning_rate=2e-2)
    return {
        **trainer_arguments(job),
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
    }


def session_for(losses: list[float]) -> tuple[Session, Any]:
    session = new_session(Job(folder="", method="gora", dropout=0.0))
    keep = session.callback(
        on_event=lambda event: losses.append(event.values["loss"]) if "loss" in event.values else None
    )
    return session, keep


def with_trainer(folder: str) -> tuple[Session, list[float]]:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    losses: list[float] = []
    session, callback = session_for(losses)
    args = TrainingArguments(**options(folder))
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


def with_sft(folder: str) -> tuple[Session, list[float]]:
    """From text, tokenized by TRL, which appends the end-of-text token itself."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    losses: list[float] = []
    session, callback = session_for(losses)
    args = SFTConfig(**options(folder), bf16=False, activation_checkpointing=False, max_length=16)
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


def with_accelerate(folder: str) -> tuple[Session, list[float]]:
    from accelerate import Accelerator
    from transformers import TrainingArguments

    args = TrainingArguments(**options(folder))
    accelerator = Accelerator(cpu=True)
    session, _ = session_for([])
    optimizer, scheduler = session.optimizers(args, STEPS)
    model, optimizer, scheduler = accelerator.prepare(session.model, optimizer, scheduler)
    model.train()
    session.begin(optimizer, STEPS)
    losses = []
    for step in range(1, STEPS + 1):
        session.before_step(step)
        loss = model(input_ids=tokens(), labels=tokens()).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
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
def trained(loop: str) -> tuple[Session, list[float]]:
    return LOOPS[loop](mkdtemp(prefix=f"{loop}-"))


@pytest.mark.parametrize("loop", LOOPS)
def test_the_loss_goes_down_and_the_guard_is_content(loop: str):
    session, losses = trained(loop)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.1
    assert session.health.status == "passed"
    assert session.step == STEPS


@pytest.mark.parametrize("loop", ["sft", "accelerate"])
def test_every_loop_gives_trainers_losses(loop: str):
    assert trained(loop)[1] == pytest.approx(trained("trainer")[1], abs=2e-4)


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


def test_an_export_before_any_forward_pass_says_that_logits_were_not_compared(tmp_path: Path):
    session = new_session(Job(folder=""))
    report = session.export(tmp_path / "adapter")
    check = next(check for check in session.health.checks if check.id == "export")
    assert report.logit_error is None
    assert "logits were not compared: there was no batch." in report.notes
    assert "logits were not compared (give batch= for that)" in check.message
