"""The trainer of a run: transformers' Trainer for classification, TRL's SFTTrainer for causal-lm, both silent."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rankwise.errors import ConfigError
from rankwise.workflows.events import Listener, PhaseProgress
from rankwise.workflows.job import Job

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import Tensor
    from transformers import EvalPrediction, Trainer

    from rankwise.training.session import Session
    from rankwise.workflows.recorder import Recorder

__all__ = ["evaluate", "head_only", "majority_share", "make_trainer"]

_OWN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def make_trainer(job: Job, session: "Session") -> "Trainer":
    """A trainer over the prepared rows, with the session's optimizer, that prints and draws nothing.

    Args:
        job: the run.
        session: whose model is trained; add its callback afterwards.

    Raises:
        ConfigError: arguments that the trainer or the recipe refuses, or a run that is all warm-up.
    """
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    options: dict[str, Any] = {
        "model": session.model,
        "args": job.arguments,
        "train_dataset": job.prepared.train,
        "eval_dataset": job.prepared.validation,
        "processing_class": job.tokenizer,
    }
    trainer: Trainer
    try:
        if job.config.task == "causal-lm":
            from trl.trainer.sft_trainer import SFTTrainer

            with _precision_kept(session.model):
                trainer = SFTTrainer(**options)
        else:
            trainer = Trainer(
                **options,
                data_collator=job.prepared.collator,
                compute_metrics=_accuracy,
                preprocess_logits_for_metrics=_predicted,
            )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())}") from error
    for silenced in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(silenced)
    own = session.recipe.optimize is not None  # then anything else than our optimizer is refused
    if own or (job.arguments.optim in _OWN_OPTIMIZERS and not job.arguments.fsdp):
        # Trainer refuses an optimizer of our own under FSDP; methods without the optimize slot need none.
        steps = trainer.set_initial_training_values(job.arguments, trainer.get_train_dataloader())[-1]
        _check_warmup(job, steps)
        trainer.optimizer, trainer.lr_scheduler = session.optimizers(job.arguments, steps)  # type: ignore[assignment]
    return trainer


@contextlib.contextmanager
def _precision_kept(model: "torch.nn.Module") -> Iterator[None]:
    """Trainable parameters stay as they are: TRL would round those on a quantized base to bfloat16."""
    before = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name].dtype:
            parameter.data = before[name].to(parameter.device)


def _check_warmup(job: Job, steps: int) -> None:
    """A run that ends within its warm-up may never leave a learning rate of 0."""
    warmup = job.arguments.get_warmup_steps(steps)
    if 0 < steps <= warmup:
        raise ConfigError(
            f"training.warmup_steps: {job.config.training['warmup_steps']:g} makes {warmup} warm-up steps of the run's "
            f"{steps}; set warmup_steps to 0 or make the run longer"
        )


def evaluate(job: Job, session: "Session", trainer: "Trainer", recorder: "Recorder") -> dict[str, object]:
    """The figures of a finished run, from evaluations of the final adapter.

    Args:
        job: the run.
        session: it was trained in.
        trainer: that trained it.
        recorder: that kept its figures.

    Returns:
        The manifest's `result`: steps, losses, and for classification accuracies beside the majority share.
    """
    figures: dict[str, object] = {}
    for part, rows in (("test", job.prepared.test), ("eval", job.prepared.validation)):
        if rows is None:
            continue
        current = part == "eval" and recorder.evaluated_at == session.step
        measured = recorder.figures if current else trainer.evaluate(rows, metric_key_prefix=part)
        for name, shown in (("accuracy", "accuracy"), ("mean_token_accuracy", "token_accuracy"), ("loss", "loss")):
            if f"{part}_{name}" in measured:
                figures[f"{part}_{shown}"] = measured[f"{part}_{name}"]
        if job.config.task == "classification":
            figures.setdefault("majority_share", majority_share(job.prepared.train, rows))
    trained = sum(parameter.numel() for parameter in session.model.parameters() if parameter.requires_grad)
    ranks = session.plan.ranks  # beside them there may be slots for ranks to come, which the budget does not hold
    trained -= sum((layer.rank - ranks[name]) * layer.base.shape.cost for name, layer in session.layers.items())
    figures |= {"train_loss": recorder.figures.get("train_loss"), "steps": session.step}
    return {**figures, "trained_parameters": trained}


def majority_share(train: "Dataset", rows: "Dataset") -> float:
    """The accuracy of always answering with the most frequent training label."""
    counts: dict[int, int] = {}
    for label in train["labels"]:
        counts[label] = counts.get(label, 0) + 1
    most = max(counts, key=lambda label: (counts[label], -label))
    return float(sum(label == most for label in rows["labels"])) / len(rows)


def _predicted(logits: "Tensor | tuple[Tensor, ...]", labels: "Tensor") -> "Tensor":
    """The predicted label of each row, so that no logits pile up."""
    first = logits[0] if isinstance(logits, tuple) else logits
    return first.argmax(-1)


def _accuracy(prediction: "EvalPrediction") -> dict[str, float]:
    """The share of rows whose predicted label is right."""
    import numpy as np

    return {"accuracy": float(np.mean(np.asarray(prediction.predictions) == np.asarray(prediction.label_ids)))}


def head_only(job: Job, listener: Listener) -> tuple[float, int]:
    """Trains what a run would train in full beside its adapter, and no adapter: what the head alone can do.

    Args:
        job: a classification run with test rows; its model is trained.
        listener: told of each step.

    Returns:
        The accuracy on the test rows, and how many parameters were trained.
    """
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for name, parameter in job.model.named_parameters():
        parameter.requires_grad_(bool(set(name.split(".")) & set(job.modules_to_save)))

    class Progress(TrainerCallback):
        """Tells of each step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """After the optimizer."""
            listener(PhaseProgress(phase="head", done=state.global_step, total=state.max_steps))

    trainer = Trainer(
        model=job.model,
        args=job.arguments,
        train_dataset=job.prepared.train,
        data_collator=job.prepared.collator,
        compute_metrics=_accuracy,
        preprocess_logits_for_metrics=_predicted,
        callbacks=[Progress()],
    )
    for silenced in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(silenced)
    trainer.train()
    assert job.prepared.test is not None
    measured = trainer.evaluate(job.prepared.test, metric_key_prefix="test")
    trained = sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad)
    return float(measured["test_accuracy"]), trained
