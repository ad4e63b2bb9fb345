"""What cannot carry a plain LoRA adapter, and why."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from rankwise.adapters.layers import view_linear
from rankwise.errors import ModelError

__all__ = ["listed", "refusal", "refuse_adapted", "refuse_wrapped", "shared_names", "wrapper_in"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# PEFT refuses these: the fused kernels read the weights and would never call the adapter.
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MAMBA_NAMES = ("out_proj", "conv1d")
_SHOWN = 5
# Each puts its attribute's name into the names of the layers inside: an adapter's file would carry names that the bare
# model does not have, and stock PEFT would load nothing from it.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def wrapper_in(model: nn.Module) -> tuple[str, str, str] | None:
    """The first wrapper of torch or an engine around the model or a part of it: (name, class, attribute inside)."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _WRAPPERS:
            return name, kind, _WRAPPERS[kind]
    return None


def refuse_wrapped(model: nn.Module) -> None:
    """Passes if nothing wraps the model or a part of it (torch.compile, data parallelism, sharding, an engine).

    Raises:
        ModelError: something does; which class, and the way to the module inside.
    """
    found = wrapper_in(model)
    if found is not None:
        name, kind, inside = found
        where, path = (f"the model's {name!r}", f"model.{name}") if name else ("the model", "model")
        raise ModelError(
            f"{where} is wrapped in {kind}, whose name {inside!r} would end up in the adapter's file, so that stock "
            f"PEFT would load nothing from it: attach before wrapping or compiling the model (use {path}.{inside}), "
            "and wrap session.model afterwards"
        )


def refuse_adapted(model: nn.Module) -> None:
    """Passes if the model carries no PEFT adapter.

    Raises:
        ModelError: it does.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise ModelError(
                f"the model already carries PEFT adapters (first at {name!r}): load a fresh base model, or take them "
                "off first with model.unload() (drops them) or model.merge_and_unload() (adds them to the weights)"
            )


def refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why PEFT's plain LoRA layer cannot be put on this module; None if it can."""
    if isinstance(module, nn.Embedding):
        return "an embedding; train it in full with modules_to_save, or leave it out"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "a convolution; only linear layers are adapted"
    if isinstance(module, nn.MultiheadAttention) or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "part of torch's fused nn.MultiheadAttention, which never calls its layers one by one"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _MAMBA_TYPES and name.split(".")[-1] in _MAMBA_NAMES:
        return f"{model_type}'s fused kernel reads this weight and would never call an adapter on it"
    view = view_linear(name, module)
    if view is None:
        return _not_linear(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.device.type == "meta":
        return "the weight is not in memory (meta device, as device_map leaves offloaded layers); load without offload"
    if not view.quantized and weight.dtype not in _FLOATING:
        return f"weights of type {weight.dtype}; float weights and bitsandbytes' 4-bit and 8-bit layers are supported"
    return None


def _not_linear(module: nn.Module) -> str:
    inside = [name for name, child in module.named_modules() if name and view_linear(name, child) is not None]
    if inside:
        return f"a {type(module).__name__}, not a linear layer; name the layers inside it: {', '.join(inside[:_SHOWN])}"
    if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
        return f"a {type(module).__name__} with stacked expert weights, for which no serving format is agreed"
    supported = "nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit and Linear8bitLt"
    return f"a {type(module).__name__}; supported are {supported}"


def shared_names(model: nn.Module) -> dict[str, str]:
    """Why a module's weight is not its own: the module has two names, or its weight is tied to another module's."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if isinstance(weight, Tensor) and weight.device.type != "meta" and weight.numel():
            names[weight.data_ptr()].append(name)
    advice = "an adapter on one of them would break the tie; name it in exclude_modules"
    return {
        name: f"it shares its weight with {listed([n for n in group if n != name])}, and {advice}"
        for group in names.values()
        if len(group) > 1
        for name in group
    }


def listed(names: Sequence[str]) -> str:
    """The first names and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
