"""The model is handed back bit for bit as it was found, also when calibration fails half-way."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.linalg.random import derived_seed

__all__ = ["left_as_found", "random_states_restored", "seeded_for_batch"]


@contextmanager
def left_as_found(model: nn.Module, *, train_mode: bool) -> Iterator[ExitStack]:
    """Puts back gradients, requires_grad, training modes, buffers, `use_cache`, checkpointing and random states.

    Inside, nothing of the model requires a gradient, `.grad` is empty, every submodule is in `train_mode`, and no
    key-value cache is built. Activation checkpointing that the user switched on works in evaluation mode too.

    Args:
        model: the unwrapped base model.
        train_mode: whether dropout is active.

    Yields:
        A stack for hook handles and whatever else must be undone before the rest.
    """
    with ExitStack() as outermost:
        outermost.enter_context(random_states_restored())
        outermost.callback(_restore_parameters, [(p, p.requires_grad, p.grad) for p in model.parameters()])
        outermost.callback(_restore_modes, [(module, module.training) for module in model.modules()])
        outermost.callback(_restore_buffers, _copies_of_buffers(model))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
            parameter.grad = None
        model.train(train_mode)
        _switch_cache_off(model, outermost)
        if not train_mode:
            _checkpoint_in_evaluation(model, outermost)
        with ExitStack() as hooks:
            yield hooks


@contextmanager
def random_states_restored() -> Iterator[None]:
    """The random states of torch (CPU and CUDA), numpy and Python are the same after as before."""
    cpu, python = torch.get_rng_state(), random.getstate()
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if on_cuda else None
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy_state is not None:
            numpy.random.set_state(numpy_state)


@contextmanager
def seeded_for_batch(seed: int, index: int) -> Iterator[None]:
    """Dropout of batch `index` draws the same numbers whichever process runs it, and however often."""
    with random_states_restored():
        batch_seed = derived_seed(seed, "calibration_batch", index)
        torch.manual_seed(batch_seed)
        random.seed(batch_seed)
        yield


def _restore_parameters(found: list[tuple[nn.Parameter, bool, Tensor | None]]) -> None:
    for parameter, requires_grad, grad in found:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)
        parameter.grad = grad


def _restore_modes(found: list[tuple[nn.Module, bool]]) -> None:
    for module, training in found:
        module.training = training


def _copies_of_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    return [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _restore_buffers(found: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    for module, name, buffer, copy in found:
        module._buffers[name] = buffer
        with torch.no_grad():
            buffer.copy_(copy)


def _switch_cache_off(model: nn.Module, stack: ExitStack) -> None:
    """Calibration never generates: key-value caches only cost memory."""
    configs = {id(c): c for c in (getattr(module, "config", None) for module in model.modules()) if c is not None}
    for config in configs.values():
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False
            stack.callback(setattr, config, "use_cache", True)


def _checkpoint_in_evaluation(model: nn.Module, stack: ExitStack) -> None:
    """Lets checkpointed layers checkpoint although they are in evaluation mode.

    transformers checkpoints a layer only if the layer's own `training` flag is set. The flag is set on the layer alone
    (its submodules, where dropout lives, stay in evaluation mode), and taken back while the layer's own code runs.
    """
    for module in model.modules():
        is_layer = any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
        if is_layer and module.gradient_checkpointing:
            checkpoint = module._gradient_checkpointing_func
            module.training = True
            module._gradient_checkpointing_func = _in_evaluation(module, checkpoint)
            stack.callback(setattr, module, "_gradient_checkpointing_func", checkpoint)


def _in_evaluation(module: nn.Module, checkpoint: Any) -> Any:
    def run(function: Any, *arguments: Any) -> Any:
        def in_evaluation(*inner: Any) -> Any:
            module.training = False
            try:
                return function(*inner)
            finally:
                module.training = True

        return checkpoint(in_evaluation, *arguments)

    return run
