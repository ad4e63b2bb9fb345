"""AdamW and its learning-rate schedule as Trainer would build them, over the adapter's own parameter groups.

`Trainer(optimizers=(optimizer, None))` ignores the weight decay of its arguments and gives one schedule to all groups,
so both are built here.
"""

import math
from typing import Any, Final

import torch
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from torch import nn
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from rankwise.errors import ConfigError

__all__ = ["adamw_and_scheduler", "parameter_groups", "unwrapped"]

_NO_DECAY: Final = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Trainer's own patterns (transformers 5.23, `get_decay_parameter_names`)."""

_ADAMW_NAMES: Final = ("adamw_torch", "adamw_torch_fused")
_FUSED_DEVICES: Final = ("cpu", "cuda", "xpu", "mps")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as AdamW groups: adapter and `modules_to_save`, each with and without decay.

    Args:
        model: the attached model.
        weight_decay: the decay of the groups that decay, >= 0.

    Returns:
        Groups with `params`, `weight_decay` and `name`; a group without parameters is left out (DeepSpeed refuses it).
    """
    decaying = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))  # type: ignore[no-untyped-call]
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "modules_to_save" if ".modules_to_save." in name else "adapter"
        decays = name in decaying
        key = kind if decays else f"{kind}, no decay"
        group = groups.setdefault(key, {"params": [], "weight_decay": weight_decay if decays else 0.0, "name": key})
        group["params"].append(parameter)
    if not groups:
        raise ConfigError("the model has no trainable parameter: attach an adapter before building its optimizer")
    return [groups[key] for key in sorted(groups)]


def adamw_and_scheduler(
    model: nn.Module, args: object, num_training_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over the adapter with the schedule that `args` asks for.

    Args:
        model: the attached model.
        args: TrainingArguments, or any object with `learning_rate` and, where they differ from Trainer's defaults,
            `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon`, `lr_scheduler_type`, `lr_scheduler_kwargs`,
            `warmup_steps` (below 1: a share of the run), `optim` (an AdamW of torch).
        num_training_steps: optimizer steps of the whole run, >= 1.

    Returns:
        The optimizer (fused: its step count then lives on the device) and its scheduler.

    Raises:
        ConfigError: a learning rate that is not above 0, no steps, another optimizer than AdamW; every fault at once.
    """
    _check(args, num_training_steps)
    groups = parameter_groups(model, float(getattr(args, "weight_decay", 0.0)))
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    optimizer = torch.optim.AdamW(
        groups,
        lr=float(args.learning_rate),  # type: ignore[attr-defined]
        betas=(float(getattr(args, "adam_beta1", 0.9)), float(getattr(args, "adam_beta2", 0.999))),
        eps=float(getattr(args, "adam_epsilon", 1e-8)),
        fused=True if devices <= set(_FUSED_DEVICES) else None,
    )
    scheduler = get_scheduler(
        getattr(args, "lr_scheduler_type", "linear"),
        optimizer=optimizer,
        num_warmup_steps=_warmup_steps(args, num_training_steps),
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=getattr(args, "lr_scheduler_kwargs", None),
    )
    return optimizer, scheduler


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper (or itself)."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer), f"{type(optimizer).__name__} is not a torch optimizer"
    return optimizer


def _check(args: object, num_training_steps: int) -> None:
    faults = []
    rate = getattr(args, "learning_rate", None)
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        faults.append(
            f"learning_rate is {rate!r}: with it nothing would train; give a number above 0, for example 2e-4"
        )
    if num_training_steps < 1:
        faults.append(f"num_training_steps is {num_training_steps}: the run needs at least one optimizer step")
    optim = str(getattr(args, "optim", _ADAMW_NAMES[0]))
    optim = optim.rpartition(".")[2].lower()
    if optim not in _ADAMW_NAMES:
        faults.append(
            f"optim is {optim!r}: session.optimizers builds {' or '.join(_ADAMW_NAMES)}; for another optimizer let "
            "Trainer build it (leave `optimizers=` out), which plain LoRA, RoRA and GoRA allow"
        )
    decay = getattr(args, "weight_decay", 0.0)
    if not 0 <= decay < math.inf:
        faults.append(f"weight_decay is {decay!r}: it must be a number >= 0")
    if faults:
        raise ConfigError(faults)


def _warmup_steps(args: object, num_training_steps: int) -> int:
    """Trainer's rule: a number below 1 is a share of the run, rounded up."""
    warmup = float(getattr(args, "warmup_steps", 0) or 0)
    return int(warmup) if warmup >= 1 else math.ceil(num_training_steps * warmup)
