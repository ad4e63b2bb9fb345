"""The `training:` section: transformers' TrainingArguments by name, with rankwise's own defaults.

Nothing surprising is inherited: every default that matters is stated in `DEFAULTS`, for Trainer and SFTTrainer alike.
"""

import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from pydantic_core import PydanticCustomError

__all__ = ["DEFAULTS", "OWNED", "RENAMED", "training_schema"]

DEFAULTS: Mapping[str, Any] = {
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,
    "optim": "adamw_torch",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.0,
    "gradient_checkpointing": False,
    "logging_strategy": "steps",
    "logging_steps": 0.02,
    "eval_strategy": "epoch",
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "seed": 0,
    "dataloader_num_workers": 0,
    "report_to": "none",
}
"""What is used where the run file says nothing; `learning_rate` follows the method and `bf16` the device."""

OWNED: Mapping[str, str] = {
    "output_dir": "it is a key of its own at the top of the run file",
    "resume_from_checkpoint": "use `rankwise train --resume`",
    "disable_tqdm": "rankwise draws its own progress",
    "do_train": "rankwise decides what runs",
    "do_eval": "rankwise decides what runs; see eval_strategy",
    "do_predict": "rankwise decides what runs",
    "remove_unused_columns": "rankwise prepares the columns itself",
    "logging_nan_inf_filter": "it is always off, so that the health checks see every loss",
    "push_to_hub": "rankwise writes folders; upload the finished one with the hub's own tool",
    "save_only_model": "a checkpoint without optimizer state cannot be continued",
    "enable_jit_checkpoint": "rankwise saves at the end of the step when it is stopped",
    "auto_find_batch_size": "a changed batch size would leave calibration and training unequal",
    "deepspeed": "not supported yet; DDP through torchrun or accelerate is",
    "prediction_loss_only": "rankwise decides what is evaluated",
    "local_rank": "torchrun sets it",
    "optim_target_modules": "it belongs to full-weight optimizers",
}
"""Arguments that belong to rankwise, with the reason shown to whoever sets them."""

RENAMED: Mapping[str, str] = {
    "warmup_ratio": "warmup_steps (a number below 1 is a share of the run)",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "use_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "save_safetensors": "nothing: rankwise always writes safetensors",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
}
"""Names that transformers had, or that people write, and what to write instead."""

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]

_RANGES: Mapping[str, Any] = {
    "learning_rate": _Positive | None,
    "num_train_epochs": _Positive,
    "per_device_train_batch_size": _Count,
    "per_device_eval_batch_size": _Count,
    "gradient_accumulation_steps": _Count,
    "warmup_steps": _NotNegative,
    "weight_decay": _NotNegative,
    "adam_beta1": Annotated[float, Field(ge=0, lt=1)],
    "adam_beta2": Annotated[float, Field(ge=0, lt=1)],
    "adam_epsilon": _Positive,
    "max_grad_norm": _NotNegative,
    "label_smoothing_factor": Annotated[float, Field(ge=0, lt=1)],
    "logging_steps": _Positive,
    "eval_steps": _Positive | None,
    "save_steps": _Positive,
    "save_total_limit": _Count | None,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
    "data_seed": Annotated[int, Field(ge=0, lt=2**32)] | None,
    "dataloader_num_workers": Annotated[int, Field(ge=0)],
    "bf16": bool | None,
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
}
"""Arguments whose range is checked here, because transformers would accept them and fail later, or not at all."""


@functools.cache
def training_schema(task: str) -> type[BaseModel]:
    """The strict schema of `training:` for one task, read off the installed transformers (and TRL for causal-lm).

    Imports torch; call it only when a run file is really read.
    """
    from transformers import TrainingArguments

    arguments: type = TrainingArguments
    if task == "causal-lm":
        from trl.trainer.sft_config import SFTConfig

        arguments = SFTConfig
    from rankwise.workflows.config_data import SFT_DATA_KEYS

    hints = typing.get_type_hints(arguments)
    fields: dict[str, Any] = {}
    for name, described in getattr(arguments, "__dataclass_fields__").items():  # noqa: B009  (a dataclass by contract)
        if not described.init or name in OWNED or name in SFT_DATA_KEYS or name.startswith(("hub_", "trackio_")):
            continue
        hint = _RANGES.get(name, _strict_hint(hints[name]))
        fields[name] = (hint | None if name not in _RANGES else hint, None)
    fields["max_steps"] = (Annotated[int, Field(ge=-1), AfterValidator(_some_steps)], None)
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    return create_model("TrainingSection", __config__=config, **fields)


def _some_steps(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("steps", "a run makes at least 1 step; -1 leaves it to num_train_epochs")
    return value


def _strict_hint(hint: Any) -> Any:
    """A type hint in which `Enumeration | str` allows the enumeration's values only."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Literal[tuple(member.value for member in hint)]
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    members = typing.get_args(hint)
    enumerations = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
    if enumerations:
        members = tuple(member for member in members if member is not str)
    return typing.Union[tuple(_strict_hint(member) for member in members)]  # noqa: UP007  (built at run time)
