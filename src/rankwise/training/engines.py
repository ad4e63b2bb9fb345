"""Who runs the steps: the engine under a trainer or loop, as far as it decides what a recipe can do."""

from typing import Any

from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]

from rankwise.methods.recipe import Situation

__all__ = ["situation_of_arguments", "situation_of_optimizer"]

_UNKNOWN_STAGE = 3
"""What is assumed of a DeepSpeed engine that does not say its ZeRO stage: the one that shards most."""


def situation_of_arguments(args: object) -> Situation:
    """What TrainingArguments (or an object like them) say of the engine.

    Args:
        args: `fsdp`, `deepspeed`, `deepspeed_plugin` and `loraplus_lr_ratio` are looked at, where they are.
    """
    plugin, asked = getattr(args, "deepspeed_plugin", None), getattr(args, "deepspeed", None)
    return Situation(
        fsdp=bool(getattr(args, "fsdp", None)),
        deepspeed=_stage(plugin, asked) if plugin is not None or asked else None,
        learning_rate_ratio=float(getattr(args, "loraplus_lr_ratio", None) or 1.0),
    )


def situation_of_optimizer(optimizer: Any) -> Situation:
    """What accelerate knows of the engine behind an optimizer that it prepared; nothing about a bare one."""
    state = getattr(optimizer, "accelerator_state", None)
    if not isinstance(state, AcceleratorState):
        return Situation()
    kind = state.distributed_type
    deepspeed = _stage(state.deepspeed_plugin, None) if kind == DistributedType.DEEPSPEED else None
    return Situation(fsdp=kind == DistributedType.FSDP, deepspeed=deepspeed)


def _stage(plugin: Any, config: Any) -> int:
    stage = getattr(plugin, "zero_stage", None)
    if stage is None and isinstance(config, dict):
        stage = config.get("zero_optimization", {}).get("stage", 0)
    return stage if isinstance(stage, int) else _UNKNOWN_STAGE
