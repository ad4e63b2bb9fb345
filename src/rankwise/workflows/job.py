"""What plan and train have in common: data, tokenizer, model, tokens, calibration batches, checked in this order."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import ConfigError
from rankwise.workflows.arguments import autocast_dtype, sft_arguments, training_arguments
from rankwise.workflows.config import RunConfig, build_recipe
from rankwise.workflows.data import RunData, load_data
from rankwise.workflows.events import Listener, Note, PhaseDone, PhaseProgress, PhaseStarted
from rankwise.workflows.model import load_model, load_tokenizer
from rankwise.workflows.prepare import Prepared, calibration_batches, prepare_classification, scoring_batches
from rankwise.workflows.prepare_causal import prepare_causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from rankwise.methods.recipe import Recipe, Situation
    from rankwise.training.attach import Calibration

__all__ = [
    "TASK_TYPES",
    "Job",
    "Phases",
    "attach_options",
    "calibration",
    "calibration_total",
    "epoch_steps",
    "job_recipe",
    "load_job",
    "max_steps",
    "validation_batches",
]

TASK_TYPES: Mapping[str, str] = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}


@dataclass(slots=True)
class Phases:
    """Times the phases of a run and tells a listener of them."""

    listener: Listener
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, title: str, *, total: int | None = None, unit: str = "") -> Iterator[list[str]]:
        """One phase; what is put into the list is shown beside its end."""
        detail: list[str] = []
        self.listener(PhaseStarted(phase=name, title=title, total=total, unit=unit))
        begun = time.perf_counter()
        yield detail
        spent = time.perf_counter() - begun
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 3)
        self.listener(PhaseDone(phase=name, seconds=spent, detail=", ".join(detail)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A run that is ready to be planned or trained.

    Args:
        config: the run file.
        data: the rows.
        tokenizer: the model's.
        model: the base model on its device.
        prepared: tokens and collator.
        arguments: of the trainer.
        modules_to_save: trained in full, the run file's or the new head.
    """

    config: RunConfig
    data: RunData
    tokenizer: "PreTrainedTokenizerBase"
    model: "PreTrainedModel"
    prepared: Prepared
    arguments: "TrainingArguments"
    modules_to_save: tuple[str, ...]


def load_job(config: RunConfig, phases: Phases) -> Job:
    """Loads data, tokenizer and model and turns rows into tokens; writes nothing.

    Raises:
        DataError: the data cannot be used.
        ModelError: the model cannot be used.
        ConfigError: settings that the libraries refuse, or a recipe that cannot train under the engine or optimizer.
    """
    with phases.phase("data", "Reading data") as detail:
        data = load_data(config)
        detail.append(f"{len(data.train):,} rows to train on")
    for note in data.notes:
        phases.listener(Note(text=note))
    _refuse_unscored(config, data)
    evaluates = data.validation is not None
    causal = config.task == "causal-lm"
    arguments = (sft_arguments if causal else training_arguments)(config, evaluates=evaluates)
    build_recipe(config).check(_situation(arguments))
    with phases.phase("model", f"Loading {config.model}") as detail:
        tokenizer = load_tokenizer(config)
        loaded = load_model(config, data.label_names)
        model = loaded.model
        if config.quantization == "none":
            model.to(arguments.device)  # type: ignore[arg-type]  # transformers' decorator loses the signature
        parameters = sum(parameter.numel() for parameter in model.parameters())
        detail.append(f"{parameters / 1e6:,.1f} M parameters")
    with phases.phase("tokens", "Preparing rows"):
        prepared = (prepare_causal if causal else prepare_classification)(config, data, model, tokenizer)
    for note in prepared.notes:
        phases.listener(Note(text=note, level="warning"))
    saved = loaded.new_modules if config.modules_to_save is None else tuple(config.modules_to_save)
    if causal:
        arguments = sft_arguments(config, evaluates=evaluates, dataset_kwargs={"skip_prepare_dataset": True})
    return Job(
        config=config,
        data=data,
        tokenizer=tokenizer,
        model=model,
        prepared=prepared,
        arguments=arguments,
        modules_to_save=saved,
    )


def _situation(arguments: "TrainingArguments") -> "Situation":
    """The engine, and the optimizer that the trainer would build."""
    from rankwise.training.engines import situation_of_arguments

    optim = str(getattr(arguments.optim, "value", arguments.optim))
    if optim == "sgd" and "momentum" in (arguments.optim_args or ""):
        optim = ""  # whether it keeps one depends on the number
    return replace(situation_of_arguments(arguments), optim=optim)


def job_recipe(job: Job) -> "Recipe":
    """The run's methods, told how many optimizer steps an epoch of its rows takes."""
    recipe, epoch = build_recipe(job.config), epoch_steps(job)
    return replace(recipe, methods=tuple(method.for_epochs_of(epoch) for method in recipe.methods))


def epoch_steps(job: Job) -> int:
    """Optimizer steps of one pass over the rows."""
    arguments = job.arguments
    batch: int = arguments.train_batch_size * arguments.gradient_accumulation_steps * max(1, arguments.world_size)
    return math.ceil(len(job.prepared.train) / batch)


def max_steps(job: Job) -> int:
    """Optimizer steps of the whole run."""
    if job.arguments.max_steps > 0:
        return int(job.arguments.max_steps)
    return max(1, math.ceil(epoch_steps(job) * float(job.arguments.num_train_epochs)))


def validation_batches(job: Job) -> list[dict[str, Any]] | None:
    """The validation rows that a schedule scores on, drawn by the run's seed; None where none scores."""
    owner = build_recipe(job.config).schedule
    if owner is None or not owner.needs_validation:
        return None
    assert job.prepared.validation is not None  # refused by load_job
    return scoring_batches(job.prepared.validation, job.prepared.collator, owner.scored_rows, job.config.seed)


def _refuse_unscored(config: RunConfig, data: RunData) -> None:
    """A schedule that scores ranks needs rows that are not trained on."""
    owner = build_recipe(config).schedule
    if owner is not None and owner.needs_validation and data.validation is None:
        raise ConfigError(
            f"data.validation: {owner.id} scores ranks on validation rows, and the run has none; name a file, or the "
            "share of the training rows to set aside (0.1)"
        )


def attach_options(job: Job) -> dict[str, Any]:
    """What `training.attach.plan` and `attach` are given alike."""
    config = job.config
    return {
        "methods": job_recipe(job),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules,
        "modules_to_save": list(job.modules_to_save) or None,
        "seed": config.seed,
    }


def calibration(job: Job, listener: Listener, cache: Path | None) -> "Calibration | None":
    """The batches of calibration, or None where no method asks for them."""
    from rankwise.training.attach import Calibration

    config, said = job.config, job.config.calibration
    if not build_recipe(config).needs_gradients:
        return None
    batches = calibration_batches(job.prepared, job.arguments.train_batch_size, config.seed)

    def progress(done: int, total: int | None) -> None:
        listener(PhaseProgress(phase="calibration", done=done, total=total))

    return Calibration(
        batches=batches,
        max_batches=said.batches,
        memory=said.memory,
        collector=said.collector,
        train_mode=said.train_mode,
        sample_share=said.sample_share,
        autocast_dtype=autocast_dtype(job.arguments),
        on_unused=said.on_unused,
        on_zero=said.on_zero,
        cache=cache if said.cache else None,
        cache_gradients=False,  # gigabytes, and a run that goes on needs no calibration
        on_batch=progress,
    )


def calibration_total(job: Job) -> int:
    """How many batches calibration will read at most."""
    available = -(-len(job.prepared.train) // job.arguments.train_batch_size)
    return min(job.config.calibration.batches, available)
