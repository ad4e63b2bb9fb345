"""The optimizer and learning-rate schedule of a run: AdamW as Trainer would build it, or the recipe's own over pairs.

`Trainer(optimizers=(optimizer, None))` ignores the weight decay of its arguments and gives one schedule to all groups,
so both are built here. A recipe's own optimizer gets lora_A and lora_B in pairs, with their scalings; whatever else is
trained stands beside them as plain parameters, which it moves as AdamW would.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

import torch
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from rankwise.adapters.attach import AdaptedLayer
from rankwise.calibration.memory import free_memory
from rankwise.errors import ConfigError
from rankwise.methods.base import Method
from rankwise.methods.schedule import Schedule, stage_ends
from rankwise.optimizers.gated import GatedAdamW

__all__ = [
    "adamw_and_scheduler",
    "adamw_settings_unused",
    "optimizer_kind",
    "own_and_scheduler",
    "pair_groups",
    "parameter_groups",
    "refuse_large_state",
    "state_in_words",
    "unwrapped",
]

_NO_DECAY: Final = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Trainer's own patterns (transformers 5.23, `get_decay_parameter_names`)."""

_ADAMW_NAMES: Final = ("adamw_torch", "adamw_torch_fused")
_FUSED_DEVICES: Final = ("cpu", "cuda", "xpu", "mps")
_ADAM: Final = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""Trainer's own defaults."""
_OWN_NAMES: Final = {"adam_beta1": ("beta1", "betas"), "adam_beta2": ("beta2", "betas"), "adam_epsilon": ("eps",)}
"""What a method may call its own."""


def parameter_groups(model: nn.Module, weight_decay: float, but: Collection[int] = ()) -> list[dict[str, Any]]:
    """The trainable parameters as AdamW groups: adapter and `modules_to_save`, each with and without decay.

    Args:
        model: the attached model.
        weight_decay: the decay of the groups that decay, >= 0.
        but: ids of parameters that are in another group.

    Returns:
        Groups with `params`, `weight_decay` and `name`; a group without parameters is left out (DeepSpeed refuses it).
    """
    decaying = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))  # type: ignore[no-untyped-call]
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in but:
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
    model: nn.Module, args: object, num_training_steps: int, schedule: Schedule | None = None
) -> tuple[Optimizer, LRScheduler]:
    """AdamW over the adapter with the schedule that `args` asks for.

    Args:
        model: the attached model.
        args: TrainingArguments, or any object with `learning_rate` and, where they differ from Trainer's defaults,
            `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon`, `lr_scheduler_type`, `lr_scheduler_kwargs`,
            `warmup_steps` (below 1: a share of the run), `optim` (an AdamW of torch).
        num_training_steps: optimizer steps of the whole run, >= 1.
        schedule: what acts around steps; its own parameters get their groups, and its stages a learning-rate schedule
            each.

    Returns:
        The optimizer (fused: its step count then lives on the device) and its scheduler.

    Raises:
        ConfigError: a learning rate that is not above 0, no steps, another optimizer than AdamW; every fault at once.
    """
    _check(args, num_training_steps)
    rate, decay = float(args.learning_rate), float(getattr(args, "weight_decay", 0.0))  # type: ignore[attr-defined]
    owned = [] if schedule is None else schedule.owned_groups(rate, decay)
    groups = [*parameter_groups(model, decay, {id(p) for group in owned for p in group["params"]}), *owned]
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    options: dict[str, Any] = {
        "lr": rate,
        "betas": _betas(args),
        "eps": float(getattr(args, "adam_epsilon", _ADAM["adam_epsilon"])),
        "fused": True if devices <= set(_FUSED_DEVICES) else None,
    }
    rule = None if schedule is None else schedule.gate_rule()
    optimizer = torch.optim.AdamW(groups, **options) if rule is None else GatedAdamW(groups, rule, **options)
    return optimizer, _scheduler(optimizer, args, num_training_steps, 1 if schedule is None else schedule.stages())


def own_and_scheduler(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], args: object, num_training_steps: int, method: Method
) -> tuple[Optimizer, LRScheduler]:
    """The optimizer that `method` brings, over the pairs of all layers, with the schedule that `args` asks for.

    Args:
        model: the attached model.
        layers: its adapted layers.
        args: as in `adamw_and_scheduler`; `adam_beta1`, `adam_beta2` and `adam_epsilon` hold for plain parameters, and
            for the pairs where the method has no setting of that name.
        num_training_steps: optimizer steps of the whole run, >= 1.
        method: fills the optimize slot.

    Returns:
        The optimizer and its scheduler, one learning-rate factor for all groups.

    Raises:
        ConfigError: as in `adamw_and_scheduler`, or nothing of the adapter is trainable.
    """
    _check(args, num_training_steps, method)
    groups = pair_groups(model, layers, args, method)
    optimizer = method.make_optimizer(groups, lr=float(args.learning_rate))  # type: ignore[attr-defined]
    return optimizer, _scheduler(optimizer, args, num_training_steps)


def pair_groups(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], args: object, method: Method
) -> list[dict[str, Any]]:
    """Groups as `Method.make_optimizer` takes them: the pairs, then whatever else is trained.

    Args:
        model: the attached model.
        layers: its adapted layers; one whose two factors are frozen is left out.
        args: see `own_and_scheduler`.
        method: whose own betas are not overridden.
    """
    decay = float(getattr(args, "weight_decay", 0.0))
    live = [layer for layer in layers.values() if layer.lora_A.requires_grad or layer.lora_B.requires_grad]
    if not live:
        raise ConfigError("the adapter has no trainable pair: attach an adapter before building its optimizer")
    factors = [factor for layer in live for factor in (layer.lora_A, layer.lora_B)]
    pairs = {
        "kind": "lora_pair",
        "name": "adapter",
        "names": [layer.name for layer in live],
        "params": factors,
        "scaling": [layer.scaling for layer in live],
        "weight_decay": decay,
        **({} if _own_setting(method, "adam_beta1") else {"betas": _betas(args)}),
    }
    held = {id(factor) for factor in factors}
    plain = {
        "kind": "plain",
        "betas": _betas(args),
        "eps": float(getattr(args, "adam_epsilon", _ADAM["adam_epsilon"])),
    }
    others = []
    for group in parameter_groups(model, decay):
        rest = [parameter for parameter in group["params"] if id(parameter) not in held]
        if rest:
            others.append({**group, **plain, "params": rest})
    return [pairs, *others]


def adamw_settings_unused(args: object, method: Method) -> tuple[str, ...]:
    """AdamW settings of `args` that were changed, and that the pairs do not follow, because the method has its own."""
    changed = [key for key, usual in _ADAM.items() if float(getattr(args, key, usual)) != usual]
    return tuple(
        f"{key} is {getattr(args, key):g}, and {method.id} moves the pairs by its own {method.id}.{own}"
        for key in changed
        if (own := _own_setting(method, key))
    )


def refuse_large_state(method: Method, layers: Mapping[str, AdaptedLayer]) -> int | None:
    """Passes if the optimizer's state fits in the free memory of the devices that its factors are on.

    Returns:
        The bytes over all devices; None if the method keeps no more than AdamW.

    Raises:
        ConfigError: it does not fit; the figures, and what to set instead.
    """
    by_device: dict[torch.device, list[AdaptedLayer]] = {}
    for layer in layers.values():
        by_device.setdefault(layer.lora_A.device, []).append(layer)
    total: int | None = None
    for device, group in by_device.items():
        needed = method.state_bytes({layer.base.shape: layer.rank for layer in group})
        if needed is None:
            continue
        total = (total or 0) + needed
        free = free_memory(device) if device.type in ("cpu", "cuda") else needed  # others cannot say
        if needed > free:
            raise ConfigError(
                f"{method.id}'s optimizer state takes {needed / 1e9:,.1f} GB for {len(group)} layers, and "
                f"{free / 1e9:,.1f} GB are free on {device}: "
                + (f"set {method.leaner}" if method.leaner else "adapt fewer layers, or use a larger device")
            )
    return total


def state_in_words(method: Method, size: int) -> str:
    """What the optimizer's state takes, for a note."""
    figure = f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.3g} MB"
    return f"{method.id} keeps {figure} of optimizer state"


def optimizer_kind(method: Method) -> type[Optimizer]:
    """The class of the optimizer that the method brings."""
    lora_A, lora_B = (nn.Parameter(torch.zeros(1, 1)) for _ in range(2))
    group = {"kind": "lora_pair", "params": [lora_A, lora_B], "scaling": [1.0], "weight_decay": 0.0}
    return type(method.make_optimizer([group], lr=1.0))


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper (or itself).

    Raises:
        ConfigError: there is none inside, as under an engine that steps by itself.
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"{type(optimizer).__name__} is not a torch optimizer, so that no step can be watched: train with "
            "session.optimizers(args, num_training_steps), without an engine that owns the optimizer"
        )
    return optimizer


def _own_setting(method: Method, key: str) -> str | None:
    """The method's own setting in place of an AdamW setting of TrainingArguments; None if it has none."""
    settings = [entry.name for entry in fields(method)]
    return next((name for name in _OWN_NAMES[key] if name in settings), None)


def _betas(args: object) -> tuple[float, float]:
    first, second = (float(getattr(args, key, _ADAM[key])) for key in ("adam_beta1", "adam_beta2"))
    return first, second


def _scheduler(optimizer: Optimizer, args: object, num_training_steps: int, stages: int = 1) -> LRScheduler:
    """The schedule of `args`; with several stages, one of the length of a stage for each, one after another."""
    length = math.ceil(num_training_steps / stages)
    made: LRScheduler = get_scheduler(
        getattr(args, "lr_scheduler_type", "linear"),
        optimizer=optimizer,
        num_warmup_steps=_warmup_steps(args, length),
        num_training_steps=length,
        scheduler_specific_kwargs=getattr(args, "lr_scheduler_kwargs", None),
    )
    if stages > 1:
        _repeat(made, stage_ends(stages, num_training_steps)[:-1])
    return made


def _repeat(scheduler: LRScheduler, starts: Sequence[int]) -> None:
    """Starts the schedule anew after each of these numbers of steps.

    Raises:
        ConfigError: a schedule that is no function of the step alone.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            f"lr_scheduler_type: {type(scheduler).__name__} cannot start anew for every stage of the schedule; use "
            "linear, cosine or constant"
        )

    def again(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor(step - max((start for start in starts if start <= step), default=0))

    scheduler.lr_lambdas = [again(factor) for factor in scheduler.lr_lambdas]


def _check(args: object, num_training_steps: int, method: Method | None = None) -> None:
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
        instead = (
            f"{' or '.join(_ADAMW_NAMES)}; for another optimizer let Trainer build it (leave `optimizers=` out), which "
            "every method without an optimizer of its own allows"
            if method is None
            else f"{method.id}'s own optimizer; leave optim at {_ADAMW_NAMES[0]}"
        )
        faults.append(f"optim is {optim!r}: session.optimizers builds {instead}")
    ratio = getattr(args, "loraplus_lr_ratio", None) or 1.0
    if ratio != 1:
        faults.append(f"loraplus_lr_ratio is {ratio!r}: both factors of a layer train at one rate here; leave it out")
    decay = getattr(args, "weight_decay", 0.0)
    if not 0 <= decay < math.inf:
        faults.append(f"weight_decay is {decay!r}: it must be a number >= 0")
    if faults:
        raise ConfigError(faults)


def _warmup_steps(args: object, num_training_steps: int) -> int:
    """Trainer's rule: a number below 1 is a share of the run, rounded up."""
    warmup = float(getattr(args, "warmup_steps", 0) or 0)
    return int(warmup) if warmup >= 1 else math.ceil(num_training_steps * warmup)
