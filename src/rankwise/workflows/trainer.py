"""The trainer of a run: transformers' Trainer for classification, TRL's SFTTrainer for causal-lm, both silent."""

from typing import TYPE_CHECKING, Any

from rankwise.workflows.job import Job

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import EvalPrediction, Trainer

    from rankwise.training.session import Session
    from rankwise.workflows.recorder import Recorder

__all__ = ["evaluate", "make_trainer"]

_OWN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def make_trainer(job: Job, session: "Session") -> "Trainer":
    """A trainer over the prepared rows, with the session's optimizer, that prints and draws nothing.

    Args:
        job: the run.
        session: whose model is trained; add its callback afterwards.
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
    if job.config.task == "causal-lm":
        from trl.trainer.sft_trainer import SFTTrainer

        trainer = SFTTrainer(**options)
    else:
        trainer = Trainer(
            **options,
            data_collator=job.prepared.collator,
            compute_metrics=_accuracy,
            preprocess_logits_for_metrics=_predicted,
        )
    for silenced in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(silenced)
    if job.arguments.optim in _OWN_OPTIMIZERS and not job.arguments.fsdp:
        # Trainer refuses an optimizer of our own under FSDP; LoRA, RoRA and GoRA need none.
        steps = trainer.set_initial_training_values(job.arguments, trainer.get_train_dataloader())[-1]
        trainer.optimizer, trainer.lr_scheduler = session.optimizers(job.arguments, steps)  # type: ignore[assignment]
    return trainer


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
    figures: dict[str, object] = {"steps": session.step, "train_loss": recorder.figures.get("train_loss")}
    for part, rows in (("eval", job.prepared.validation), ("test", job.prepared.test)):
        if rows is None:
            continue
        current = part == "eval" and recorder.evaluated_at == session.step
        measured = recorder.figures if current else trainer.evaluate(rows, metric_key_prefix=part)
        figures |= {key: measured[key] for key in (f"{part}_loss", f"{part}_accuracy") if key in measured}
        if f"{part}_accuracy" not in measured and f"{part}_mean_token_accuracy" in measured:
            figures[f"{part}_token_accuracy"] = measured[f"{part}_mean_token_accuracy"]
        if job.config.task == "classification":
            figures[f"{part}_majority_share"] = majority_share(job.prepared.train, rows)
    return figures


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
