"""A written adapter on a model: as a second adapter on the live base, which is left as found, or on a fresh base."""

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rankwise.adapters.boosters import live_boosters
from rankwise.adapters.layers import view_linear
from rankwise.adapters.offset import LiveOffset
from rankwise.errors import ExportError, ModelError, VerificationError
from rankwise.ranks.shapes import LayerShape

if TYPE_CHECKING:
    from peft import PeftModel

    from rankwise.export.fold import FoldedAdapter

__all__ = [
    "adapter_on_base",
    "base_as_found",
    "computed_logits",
    "file_as_second_adapter",
    "left_as_found",
    "loaded_on_fresh",
    "refuse_other_base",
]

_SECOND_ADAPTER = "rankwise_written"


def computed_logits(
    model: nn.Module, batch: Mapping[str, object], tensors: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The logits (or the last hidden state) in evaluation mode, without gradients or autocast, on the CPU.

    Args:
        model: left as found.
        batch: keyword arguments of its forward.
        tensors: parameters and buffers by name to compute with in place of the model's own.
    """
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    with left_as_found(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        model.eval()
        output = model(**inputs) if tensors is None else functional_call(model, _moved(tensors, device), (), inputs)
    for field in ("logits", "last_hidden_state"):
        found = getattr(output, field, None)
        if isinstance(found, Tensor):
            return found.detach().cpu()
    if isinstance(output, Tensor):
        return output.detach().cpu()
    raise ExportError(
        f"{type(model).__name__} returns a {type(output).__name__} without logits, so that the adapter cannot be "
        "verified on it. Export without a batch: updates are still compared."
    )


def file_as_second_adapter(
    model: "PeftModel", folder: Path, batch: Mapping[str, object], adapter_name: str = "default"
) -> Tensor:
    """The logits of the model with the written file, loaded by stock PEFT, in place of the trained adapter.

    Hooks on the trained adapter's own modules do not act on the second one. Everything is put back: the second adapter
    is removed; active adapter, requires_grad, training modes and random states are restored.
    """
    active = model.active_adapter
    with left_as_found(model):
        try:
            with _quiet():
                result = model.load_adapter(str(folder), adapter_name=_SECOND_ADAPTER)
            _refuse_missing(folder, result.missing_keys)
            model.set_adapter(_SECOND_ADAPTER)
            return computed_logits(model, batch)
        finally:
            if _SECOND_ADAPTER in model.peft_config:
                with _quiet():
                    model.set_adapter(active)
                    model.delete_adapter(_SECOND_ADAPTER)


def loaded_on_fresh(base: nn.Module, folder: Path, batch: Mapping[str, object]) -> Tensor:
    """The logits of a fresh base model with the file loaded by stock PEFT; the base keeps the adapter."""
    from peft import PeftModel

    with left_as_found(base), _quiet():
        loaded = PeftModel.from_pretrained(cast("PeftModel", base), str(folder))
    return computed_logits(loaded, batch)


def refuse_other_base(base: nn.Module, folded: "FoldedAdapter", source: Path) -> None:
    """Passes if the base model has every layer of the adapter, of the adapter's sizes.

    Args:
        base: only read.
        folded: the adapter.
        source: the folder it is from, for the message.

    Raises:
        ModelError: says how many layers are missing or of other sizes, and which base the adapter names.
    """
    modules = dict(base.named_modules())
    missing = [name for name in folded.layers if name not in modules]
    others = []
    for name, layer in folded.layers.items():
        found = view_linear(name, modules[name]) if name in modules else None
        if found is not None and found.shape != layer.shape:
            others.append(f"{name} is {_size(found.shape)} there and {_size(layer.shape)} in the adapter")
    if not missing and not others:
        return
    count = len(folded.layers)
    faults = [f"{len(missing)} of {count} layers are missing (first {missing[0]})"] if missing else []
    faults += [f"{len(others)} of {count} layers have other sizes (first {others[0]})"] if others else []
    name = getattr(getattr(base, "config", None), "_name_or_path", "") or "the model"
    named = f"names {folded.base_name}" if folded.base_name else "names none"
    raise ModelError(
        f"--base: {name} ({type(base).__name__}) is not the base of {source}: {'; '.join(faults)}; "
        f"adapter_config.json {named}. Give the model that it was trained on."
    )


def _size(shape: LayerShape) -> str:
    return f"[{shape.out_features}, {shape.in_features}]"


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on the device; names that share one tensor still share one."""
    moved = {id(tensor): tensor.to(device) for tensor in tensors.values()}
    return {name: moved[id(tensor)] for name, tensor in tensors.items()}


@contextmanager
def adapter_on_base(base: nn.Module, folder: Path) -> Iterator["PeftModel"]:
    """The base model with a native adapter folder loaded by stock PEFT; the base is left as found."""
    from peft import PeftModel

    had_config = "peft_config" in vars(base)
    children = [(parent, name, child) for parent in base.modules() for name, child in parent.named_children()]
    with left_as_found(base):
        try:
            with _quiet():
                model = PeftModel.from_pretrained(cast("PeftModel", base), str(folder))
            yield model
        finally:
            # Not PEFT's own unload(): it leaves the trained copies of modules_to_save in the base.
            for parent, name, child in children:
                if getattr(parent, name) is not child:
                    setattr(parent, name, child)
            if not had_config and "peft_config" in vars(base):
                del base.peft_config


@contextmanager
def base_as_found(model: nn.Module, offset: LiveOffset | None = None) -> Iterator[None]:
    """Inside, the base weights are as found, where a start (`offset`) or boosters have been written to them."""
    boosters = live_boosters(model)
    with ExitStack() as stack:
        if offset is not None:
            stack.enter_context(offset.base_as_found())
        if boosters is not None:
            stack.enter_context(boosters.base_as_found())
        yield


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Training modes, requires_grad flags and random states (torch, numpy, python) are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _refuse_missing(folder: Path, missing: list[str]) -> None:
    if missing:
        raise VerificationError(f"{folder}: PEFT built layers that the file holds no factors for: {missing[:3]}.")


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT 0.21 warns at every load of things that are as intended here (see adapters.attach)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        yield
