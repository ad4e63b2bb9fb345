"""The run file's settings as transformers' TrainingArguments or TRL's SFTConfig, every default stated."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import ConfigError
from rankwise.workflows.config import RunConfig
from rankwise.workflows.model import model_dtype

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

__all__ = ["autocast_dtype", "sft_arguments", "training_arguments"]

_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def training_arguments(config: RunConfig, *, evaluates: bool) -> "TrainingArguments":
    """The arguments of a classification run.

    Args:
        config: the run file.
        evaluates: whether there are validation rows.
    """
    from transformers import TrainingArguments

    return _made(TrainingArguments, {**_common(config, evaluates=evaluates), "remove_unused_columns": False})


def sft_arguments(config: RunConfig, *, evaluates: bool, **data: Any) -> "TrainingArguments":
    """The arguments of a causal-lm run.

    Args:
        config: the run file.
        evaluates: whether there are validation rows.
        data: SFTConfig's data keys that differ from the run file's.
    """
    from trl.trainer.sft_config import SFTConfig

    said = config.data
    keys = {
        "max_length": said.max_length,
        "dataset_text_field": said.dataset_text_field,
        "packing": said.packing,
        "packing_strategy": said.packing_strategy,
        "eval_packing": said.eval_packing,
        "completion_only_loss": said.completion_only_loss,
        "assistant_only_loss": said.assistant_only_loss,
        "eos_token": said.eos_token,
        "pad_to_multiple_of": said.pad_to_multiple_of,
        "dataset_num_proc": said.dataset_num_proc,
        "loss_type": "nll",
    }
    return _made(SFTConfig, {**keys, **_common(config, evaluates=evaluates), **data})


def autocast_dtype(arguments: "TrainingArguments") -> "torch.dtype | None":
    """The autocast that training will use, for calibration."""
    import torch

    if arguments.bf16:
        return torch.bfloat16
    return torch.float16 if arguments.fp16 else None


def _common(config: RunConfig, *, evaluates: bool) -> dict[str, Any]:
    """What both kinds of arguments share."""
    import torch

    said = {key: value for key, value in config.training.items() if value is not None}
    half = model_dtype(config) is torch.bfloat16
    values = {
        "bf16": half and not said.get("fp16", False),
        "data_seed": said["seed"],
        **said,
        "learning_rate": config.learning_rate,
        "output_dir": str(config.folder),
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": torch.cuda.is_available() and not said.get("use_cpu", False),
    }
    if not evaluates:
        values["eval_strategy"] = "no"
    return _renamed(values)


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Gradient checkpointing under the name that the installed transformers wants; run files keep the common one."""
    from transformers import TrainingArguments

    known = getattr(TrainingArguments, "__dataclass_fields__")  # noqa: B009  (a dataclass by contract)
    for old, new in _RENAMED.items():
        if new in known and old in values:
            values.setdefault(new, values.pop(old))
    return values


def _made(kind: Any, values: dict[str, Any]) -> "TrainingArguments":
    """Constructs the arguments; what the library refuses is a fault of the run file."""
    output = Path(values["output_dir"])
    existed = output.exists()
    try:
        made: TrainingArguments = kind(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())}") from error
    assert existed or not output.exists(), "the arguments must not make the output folder"
    return made
