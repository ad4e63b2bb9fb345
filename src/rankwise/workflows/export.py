"""`rankwise export`: a checkpoint, a run or any plain LoRA folder as a verified adapter for serving."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import ArtifactError, ConfigError, ModelError, OutputError
from rankwise.ranks.plan import RankPlan
from rankwise.workflows.events import Listener, Note, ignore
from rankwise.workflows.job import Phases
from rankwise.workflows.quiet import quiet_libraries
from rankwise.workflows.run_folder import read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rankwise.export.write import ExportReport

__all__ = ["export"]

_LAYOUTS = ("uniform", "compact", "per_rank", "merged")
_KEPT_FILES = ("README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def export(
    source: Path,
    destination: Path,
    listener: Listener = ignore,
    *,
    layout: str | None = None,
    consumer: str | None = None,
    dtype: str | None = None,
    max_rank: int | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> "ExportReport":
    """Writes an adapter so that servers compute the trained model, and proves it.

    Args:
        source: a run's folder (its final adapter, or its last checkpoint), a checkpoint or any plain PEFT LoRA.
        destination: where to write.
        listener: told of each phase.
        layout: uniform, compact, per_rank or merged; by default what the consumer reads best, else uniform.
        consumer: who must read it: peft, vllm, sglang, tgi, gguf, ollama, mlx, merged, ...
        dtype: float32, bfloat16 or float16.
        max_rank: the most ranks a layer may have; what re-compression discards is told by layer and in all.
        base_model: the base model for merged weights and a comparison of logits; by default none is loaded, but for
            merged weights the one that the adapter names.
        overwrite: whether an adapter that is already there may be replaced.

    Returns:
        What was written, with the measured figures.

    Raises:
        ArtifactError: the source is missing, damaged, an unfinished checkpoint or no plain LoRA.
        ConfigError, OutputError, ExportError, VerificationError: as `export.write.export_folder`.
    """
    from rankwise.export.staging import refuse_unwritable
    from rankwise.export.write import export_folder

    source = Path(source)
    chosen = _layout(layout, consumer)
    refuse_unwritable(Path(destination))  # before a base model is loaded
    folder = _adapter_folder(source, listener)
    phases = Phases(listener)
    with quiet_libraries():
        base = None
        if base_model is not None or chosen == "merged":
            with phases.phase("model", "Loading the base model"):
                base = _load_base(folder, base_model)
        with phases.phase("export", "Writing and verifying the adapter"):
            return export_folder(
                folder,
                destination,
                layout=chosen,
                dtype=dtype,
                max_rank=max_rank,
                consumers=(consumer,) if consumer is not None and consumer != "merged" else (),
                base=base,
                batch=None if base is None else _probe(base),
                extra_files={name: folder / name for name in _KEPT_FILES if (folder / name).is_file()},
                plan=_plan_of(folder),
                overwrite=overwrite,
            )


def _layout(layout: str | None, consumer: str | None) -> Any:
    """The layout that was asked for, or the one that serves the consumer."""
    from rankwise.export.consumers import consumer_layout

    if layout is not None and layout not in _LAYOUTS:
        raise ConfigError(f"layout: {layout!r} is not one of {', '.join(_LAYOUTS)}")
    fitting = "uniform" if consumer is None else consumer_layout(consumer)
    if fitting == "merged" and layout not in (None, "merged"):
        raise ConfigError(f"layout: --for merged writes merged weights, and --layout asks for {layout}; give one")
    return layout or fitting


def _adapter_folder(source: Path, listener: Listener) -> Path:
    """The folder that holds the adapter: the source itself, or the last checkpoint of an unfinished run."""
    from rankwise.export.stored import refuse_unfinished
    from rankwise.training.state import last_complete_checkpoint

    if not source.exists():
        raise ArtifactError(f"{source} does not exist; give a run's folder, a checkpoint or a PEFT LoRA folder")
    if (source / "adapter_config.json").is_file():
        refuse_unfinished(source)  # before a base model is loaded
        return source
    if source.is_dir() and _is_finished(source):
        raise ArtifactError(
            f"{source}: the final adapter is incomplete: adapter_config.json is missing; put it back, or name the "
            "checkpoint to export"
        )
    checkpoint = last_complete_checkpoint(source) if source.is_dir() else None
    if checkpoint is None:
        raise ArtifactError(
            f"{source} holds no adapter_config.json and no complete checkpoint; give a run's folder, a checkpoint or a "
            "PEFT LoRA folder"
        )
    listener(Note(text=f"{source} holds no final adapter; exporting {checkpoint.name}", level="warning"))
    return checkpoint


def _is_finished(folder: Path) -> bool:
    """Whether a run left its final adapter here, by its manifest or, without one, by the adapter's weights."""
    try:
        manifest = read_manifest(folder)
    except OutputError:
        manifest = None
    if manifest is None:
        return (folder / "adapter_model.safetensors").is_file()
    return bool(manifest.get("status") == "finished")


def _plan_of(folder: Path) -> RankPlan | None:
    """The plan of a run's folder or of a checkpoint in one; a final adapter has its ranks padded and needs none."""
    if (folder / "plan.json").is_file():
        return None
    beside = folder.parent / "plan.json"
    inside_run = folder.name.startswith("checkpoint-") and beside.is_file()
    return RankPlan.load(beside) if inside_run else None


def _load_base(folder: Path, base_model: str | None) -> "PreTrainedModel":
    """The base model that merged weights and logits need, for the adapter's task."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = base_model or settings.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"--base: {folder} does not name its base model; give it")
    kind: Any = AutoModelForCausalLM
    options: dict[str, Any] = {}
    if settings.get("task_type") == "SEQ_CLS":
        kind = AutoModelForSequenceClassification
        labels = _label_names(folder)
        options = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    try:
        model: PreTrainedModel = kind.from_pretrained(name, **options)
    except Exception as error:
        raise ModelError(f"--base: cannot load {name}: {' '.join(str(error).split())[:400]}") from error
    model.eval()  # type: ignore[no-untyped-call, unused-ignore]
    return model


def _label_names(folder: Path) -> list[str]:
    """The labels of a classification run, from its manifest."""
    for place in (folder, folder.parent):
        manifest = None if place != folder and not folder.name.startswith("checkpoint-") else _run_manifest(place)
        if manifest is not None:
            return [str(name) for name in manifest.get("label_names", [])]
    raise ConfigError(f"--base: the labels of {folder} are not known without the run's rankwise.json beside it")


def _run_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "rankwise.json"
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")).get("format") != "rankwise-run":
        return None
    return read_manifest(folder)


def _probe(model: "PreTrainedModel") -> dict[str, Any]:
    """A small batch of token ids: any input tells two models apart."""
    import torch

    from rankwise.linalg.random import generator

    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (2, 8), generator=generator(0, "export-probe")).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
