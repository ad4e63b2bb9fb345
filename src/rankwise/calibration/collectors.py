"""Two ways to see a layer's gradient during a backward pass; both equal autograd's.

`outer` leaves the base frozen and sees the two factors of dL/dW = gY.T @ X: a forward hook captures X, a hook on the
output tensor receives gY. `param` lets autograd form dL/dW and takes it away at once. Neither touches the model beyond
hooks and requires_grad flags, which the caller's stack undoes (as_found.py).

X is held through autograd's own saved-tensor machinery, so that activation checkpointing drops it and computes it again
like every other activation.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.layers import LinearLayer, view_linear
from rankwise.errors import CalibrationError

__all__ = ["Receiver", "WeightUses", "attach_outer", "attach_param", "make_inputs_differentiable"]


class Receiver(Protocol):
    """Where a collector delivers, once for each use of a layer in a backward pass."""

    def outer(self, index: int, output_grad: Float[Tensor, "tokens out"], inputs: Float[Tensor, "tokens in"]) -> None:
        """Factors of one use's gradient of layer `index`."""
        ...

    def gradient(self, index: int, gradient: Float[Tensor, "out in"]) -> None:
        """The finished gradient of layer `index`."""
        ...


class WeightUses:
    """Which modules of a model hold which weight: tied weights are one weight with several uses.

    Args:
        model: the base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._holders: dict[int, list[tuple[str, nn.Module, nn.Parameter]]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._holders.setdefault(_identity(parameter), []).append((name, module, parameter))

    def holders(self, layer: LinearLayer) -> list[tuple[str, nn.Module, nn.Parameter]]:
        """Every (name, module, parameter) that shares the layer's weight, the layer itself included."""
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        return self._holders.get(_identity(weight), [])

    def only_linear(self, layer: LinearLayer) -> bool:
        """Whether every use of the layer's weight is a linear layer (not, say, the embedding it is tied to)."""
        return all(view_linear(name, module) is not None for name, module, _ in self.holders(layer))


def attach_outer(uses: WeightUses, layers: Sequence[LinearLayer], receiver: Receiver, stack: ExitStack) -> None:
    """Hooks that deliver gY and X of each layer; the base stays frozen, and backward ends at the lowest layer.

    Raises:
        CalibrationError: a layer whose weight is tied to something that is no linear layer.
    """
    for index, layer in enumerate(layers):
        if not uses.only_linear(layer):
            others = [name for name, module, _ in uses.holders(layer) if view_linear(name, module) is None]
            raise CalibrationError(
                f"{layer.name}: its weight is tied to {', '.join(others)}, which is no linear layer, so collector "
                "'outer' would see only part of its gradient. Use collector 'param' or 'auto', or leave the layer out."
            )
        for _, module, _ in uses.holders(layer):
            hook = _outer_hook(index, receiver)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)


def attach_param(uses: WeightUses, layers: Sequence[LinearLayer], receiver: Receiver, stack: ExitStack) -> None:
    """Hooks that deliver each layer's finished gradient and clear `.grad`; only these layers require gradients."""
    for index, layer in enumerate(layers):
        for parameter in {id(p): p for _, _, p in uses.holders(layer)}.values():
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)
            hook = _param_hook(index, layer.kind == "conv1d", receiver)
            stack.callback(_after_accumulation(parameter, hook))


def make_inputs_differentiable(model: nn.Module, stack: ExitStack) -> None:
    """Lets the input embeddings' output require a gradient, without which reentrant checkpointing has no backward."""
    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if find is not None else None
    if isinstance(embeddings, nn.Module):
        stack.callback(embeddings.register_forward_hook(_differentiable_output).remove)


class _Source(torch.autograd.Function):
    """A value from which backward goes no further down, but which has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class _Hold(torch.autograd.Function):
    """A node that keeps a tensor the way autograd keeps activations; it takes no part in any backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def _cut_below(value: Tensor) -> Tensor:
    cut: Tensor = _Source.apply(value, torch.empty(0, requires_grad=True))  # type: ignore[no-untyped-call]
    return cut


def _hold(value: Tensor) -> Any:
    """A graph node whose `saved_tensors` is the value; the node is not connected to the loss."""
    return _Hold.apply(value.detach(), torch.empty(0, requires_grad=True)).grad_fn  # type: ignore[no-untyped-call]


def _after_accumulation(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> Callable[[], None]:
    remove: Callable[[], None] = parameter.register_post_accumulate_grad_hook(hook).remove  # type: ignore[no-untyped-call]
    return remove


def _outer_hook(index: int, receiver: Receiver) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None  # reentrant checkpointing: the layer runs again, with gradients, in the backward pass
        inputs = args[0] if args else next(iter(kwargs.values()))
        seen = output if output.requires_grad else _cut_below(output)
        held = [_hold(inputs)]

        def deliver(output_grad: Tensor) -> None:
            (activations,) = held.pop().saved_tensors
            with torch.no_grad():
                flat = output_grad.reshape(-1, output_grad.shape[-1])
                # Under autocast the layer multiplied the input's 16-bit rounding, and so does autograd.
                receiver.outer(index, flat, activations.reshape(-1, activations.shape[-1]).to(flat.dtype))

        seen.register_hook(deliver)  # type: ignore[no-untyped-call]
        return None if seen is output else seen

    return hook


def _param_hook(index: int, transposed: bool, receiver: Receiver) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        receiver.gradient(index, gradient.T if transposed else gradient)

    return hook


def _differentiable_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else _cut_below(output)


def _identity(parameter: Tensor) -> int:
    """Equal for parameters that share memory; sharded and meta tensors have no address of their own."""
    return parameter.data_ptr() or id(parameter)
