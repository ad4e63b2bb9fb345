"""Training jobs on a tiny Llama that tests run in this process or in a fresh one, and kill."""

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from rankwise.methods.base import Method
from rankwise.methods.recipe import Recipe, method_from_id
from rankwise.training.attach import attach
from rankwise.training.session import Session
from rankwise.training.state import last_complete_checkpoint, resume
from tests.support.models import causal_batch, tiny_llama

ROWS = 22
"""Not a multiple of batch 2 times accumulation 2: the last step of an epoch is a short one."""


class Rows(Dataset[dict[str, Tensor]]):
    """Token rows with a rule to learn: each token is followed by the next larger one."""

    def __init__(self, rows: int = ROWS, length: int = 10) -> None:
        starts = torch.randint(3, 40, (rows, 1), generator=torch.Generator().manual_seed(7))
        self.tokens = starts + torch.arange(length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


@dataclass(frozen=True)
class Job:
    """One training run, wherever it runs."""

    folder: str
    loop: str = "trainer"
    method: str = "rora"
    steps: int = 9
    save_steps: int = 2
    keep: int | None = 1
    dropout: float = 0.1
    learning_rate: float | None = None
    """By default 5e-3, or what suits the recipe."""
    scheduler: str = "cosine"
    stop_after: int | None = None
    """End the process's part of the run after so many steps (the schedule still spans them all)."""


RECIPES: Mapping[str, tuple[str | Method, ...]] = {
    "rora": ("rora",),
    "gora": ("gora",),
    "lora-ga": ("lora-ga",),
    "lora-ga base": (method_from_id("lora-ga", {"offset": "base"}),),
    "lora-pro": ("lora-pro",),
    "lora-pro full": (method_from_id("lora-pro", {"mode": "full"}),),
    "lora-rite": ("lora-rite",),
    "ab-lora": (method_from_id("ab-lora", {"prune_per_round": 3, "sequences": 6}),),
    "ab-lora screened": (method_from_id("ab-lora", {"prune_per_round": 3, "score": "screened", "sequences": 12}),),
    "ab-lora taylor": (method_from_id("ab-lora", {"prune_per_round": 3, "score": "taylor", "sequences": 6}),),
    "sora": (method_from_id("sora", {"target_density": 0.5}),),
    "beamlora": (method_from_id("beamlora", {"reset_every": 3, "cumsum_threshold": 0.8}),),
    "xgblora": (method_from_id("xgblora", {"round_steps": 3, "layers_fraction": 0.5}),),
    "xgblora merge": (method_from_id("xgblora", {"round_steps": 3, "layers_fraction": 0.5, "accumulate": "merge"}),),
    "ggpo": ("ggpo",),
    "mgpo": ("mgpo",),
    "gora lora-rite": ("gora", "lora-rite"),
    "lora-ga lora-pro": ("lora-ga", "lora-pro"),
    "gora ggpo": ("gora", "ggpo"),
    "rora mgpo": ("rora", "mgpo"),
}
"""What a job's `method` stands for."""

LEARNING_RATES = {"gora lora-rite": 1e-4, "lora-ga lora-pro": 2e-3}
"""RITE moves the product by rate times scaling, which is 8 here: at a high rate round-off decides where it goes."""


def rate_of(job: Job) -> float:
    return job.learning_rate or LEARNING_RATES.get(job.method, 5e-3)


def recipe_of(job: Job) -> Recipe:
    return Recipe.of(RECIPES[job.method])


def new_session(job: Job) -> Session:
    recipe = recipe_of(job)
    if recipe.needs_gradients:
        batches = [causal_batch(seed) for seed in range(3)]
        return attach(tiny_llama(), recipe, r=4, lora_dropout=job.dropout, calibration=batches)
    return attach(
        tiny_llama(),
        recipe,
        r=4,
        lora_dropout=job.dropout,
        target_modules=["q_proj", "v_proj", "up_proj"],
        validation=validation_of(job),
    )


def validation_of(job: Job) -> list[Any] | None:
    """What a schedule scores on; None where none scores."""
    owner = recipe_of(job).schedule
    return (
        [causal_batch(seed, rows=3) for seed in range(40, 44)] if owner is not None and owner.needs_validation else None
    )


def resumed_session(job: Job, checkpoint: Path) -> Session:
    return resume(tiny_llama(), checkpoint, validation=validation_of(job))


def factors(session: Session) -> dict[str, Tensor]:
    found = {}
    for name, layer in session.layers.items():
        found[f"{name}.A"], found[f"{name}.B"] = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    state = session.fold_state
    for name, pair in state.boosters.items():
        found[f"{name}.boosters.A"], found[f"{name}.boosters.B"] = pair.lora_A, pair.lora_B
    return found | {f"{name}.gate": gate for name, gate in state.gates.items()}


def run(job: Job, before: Callable[[], None] | None = None) -> None:
    """Starts the run or goes on with it, and leaves `final.safetensors` in its folder."""
    if before is not None:
        before()
    torch.set_num_threads(1)
    checkpoint = last_complete_checkpoint(job.folder)
    session = new_session(job) if checkpoint is None else resumed_session(job, checkpoint)
    LOOPS[job.loop](job, session, checkpoint)
    save_file(factors(session), Path(job.folder) / "final.safetensors")


def final(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "final.safetensors")


def trainer_arguments(job: Job) -> dict[str, Any]:
    return {
        "output_dir": job.folder,
        "learning_rate": rate_of(job),
        "weight_decay": 0.01,
        "max_steps": job.steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": job.scheduler,
        "warmup_steps": 2,
        "max_grad_norm": 0.0 if recipe_of(job).unclipped else 1.0,
        "logging_steps": 3,
        "save_steps": job.save_steps,
        "save_total_limit": job.keep,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }


def _trainer(job: Job, session: Session, checkpoint: Path | None) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    args = TrainingArguments(**trainer_arguments(job))
    trainer = Trainer(
        session.model,
        args,
        train_dataset=Rows(),
        optimizers=session.optimizers(args, job.steps),
        callbacks=[session.callback(), *stopper(job)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _sft(job: Job, session: Session, checkpoint: Path | None) -> None:
    from datasets import Dataset as Table
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    args = SFTConfig(
        **trainer_arguments(job),
        bf16=False,
        activation_checkpointing=False,
        max_length=16,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    table = Table.from_dict({"input_ids": Rows().tokens.tolist()})
    trainer = SFTTrainer(
        session.model,
        args,
        train_dataset=table,
        processing_class=tokenizer(),
        optimizers=session.optimizers(args, job.steps),
        callbacks=[session.callback(), *stopper(job)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _accelerate(job: Job, session: Session, checkpoint: Path | None) -> None:
    """A bare loop, as the documentation shows it."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader
    from transformers import TrainingArguments

    set_seed(3)
    args = TrainingArguments(**trainer_arguments(job))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader: DataLoader[Any] = DataLoader(Rows(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))
    optimizer, scheduler = session.optimizers(args, job.steps)
    model, optimizer, loader, scheduler = accelerator.prepare(session.model, optimizer, loader, scheduler)
    model.train()
    done = 0 if checkpoint is None else session.restore(checkpoint, optimizer, scheduler)
    session.begin(optimizer, job.steps)
    seen, step = 0, 0
    while step < (job.stop_after or job.steps):
        for batch in loader:
            seen += 1
            if step < done:  # passed over: these batches were trained on before the checkpoint
                step += seen % len(loader) % 2 == 0 or seen % len(loader) == 0
                continue
            session.before_step(step + 1)
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if not accelerator.sync_gradients:
                    continue
                limit = args.max_grad_norm or float("inf")
                norm = accelerator.clip_grad_norm_(model.parameters(), limit)
                session.before_optimizer_step(step + 1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            step += 1
            session.after_step(step)
            if step % 3 == 0:
                session.logged(step, {"loss": float(loss.detach()), "grad_norm": float(norm)})
            if step % job.save_steps == 0:
                session.save(Path(job.folder) / f"checkpoint-{step}", optimizer=optimizer, scheduler=scheduler)
            if step >= (job.stop_after or job.steps):
                break
    session.end(step)


LOOPS: dict[str, Callable[[Job, Session, Path | None], None]] = {
    "trainer": _trainer,
    "sft": _sft,
    "accelerate": _accelerate,
}


def stopper(job: Job) -> list[Any]:
    """A callback that ends this process's part of the run, if it is to end early."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == job.stop_after

    return [] if job.stop_after is None else [Stop()]


def tokenizer() -> Any:
    """Words `3` to `63` and three special tokens, built on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {str(number): number for number in range(3, 64)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def kill_now() -> None:
    """No cleanup, no goodbye."""
    os.kill(os.getpid(), signal.SIGKILL)
