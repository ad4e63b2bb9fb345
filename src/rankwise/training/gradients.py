"""Non-finite gradients: the pair they hit sits the step out, everything else trains on.

After the last backward pass of a step, and before anybody clips, the gradients of every unit (one pair of lora_A and
lora_B, or all of `modules_to_save`) are checked. A unit with a NaN or an infinity gets zero gradients, so that it does
not spoil the clip norm of the others, and its parameters and optimizer state leave the step as they entered it. On the
CPU, where reading a flag costs nothing, the optimizer simply does not see the unit; on an accelerator reading it would
stall the queue, so the unit is put back by a device-side `where` and counted there. Of parameters sharded by FSDP2 each
process looks at its own part, and the findings are summed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.state import GradientState  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rankwise.calibration.processes import all_reduce_sum

__all__ = ["GradientFilter", "local"]


class GradientFilter:
    """Keeps non-finite gradients out of the optimizer, and knows which units really trained.

    Args:
        units: by name, the parameters that stand or fall together.
        on_host: whether flags may be read at every step; by default only where all parameters are on the CPU.
    """

    def __init__(self, units: Mapping[str, Sequence[nn.Parameter]], *, on_host: bool | None = None) -> None:
        self.names = tuple(units)
        self._parameters = [parameter for unit in units.values() for parameter in unit]
        self._unit_of = [index for index, unit in enumerate(units.values()) for _ in unit]
        self._home = self._parameters[0].device
        self._sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters)
        self._on_host = all(p.device.type == "cpu" for p in self._parameters) if on_host is None else on_host
        self.protecting = True
        self.steps = 0
        zeros = torch.zeros(len(units), device=self._home)
        self._skipped = zeros.to(torch.int64)
        self._exercised = zeros.to(torch.bool)
        self._bad = zeros.to(torch.bool)
        self._live = zeros.to(torch.bool)
        self._queued = False
        self._unseen = False
        self._saved: list[tuple[Tensor, Tensor, int]] = []
        self._fresh: list[int] = []
        self._index_cache: dict[tuple[int, ...], Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def watches(self, units: Mapping[str, Sequence[nn.Parameter]]) -> bool:
        """Whether these are still the very parameters; FSDP puts others in their place."""
        live = [parameter for unit in units.values() for parameter in unit]
        return len(live) == len(self._parameters) and all(a is b for a, b in zip(live, self._parameters, strict=True))

    def install(self, optimizer: Optimizer) -> None:
        """Hooks the parameters' backward and the optimizer's step; a second call moves to another optimizer."""
        self.remove()
        for parameter in self._parameters:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))  # type: ignore[no-untyped-call]
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Takes every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._queued = False

    def skipped(self) -> dict[str, int]:
        """Steps that each unit sat out; reads the device."""
        return dict(zip(self.names, self._skipped.tolist(), strict=True))

    def exercised(self) -> dict[str, bool]:
        """Whether each unit had a finite non-zero gradient in a step at a learning rate above 0; reads the device."""
        return dict(zip(self.names, self._exercised.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready counters."""
        return {"steps": self.steps, "skipped": self.skipped(), "exercised": self.exercised()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict` of the same units."""
        self.steps = int(state["steps"])
        self._skipped.copy_(torch.tensor([int(state["skipped"].get(name, 0)) for name in self.names]))
        self._exercised.copy_(torch.tensor([bool(state["exercised"].get(name, False)) for name in self.names]))

    def _on_gradient(self, _: Tensor) -> None:
        if not self._queued:
            self._queued = True
            _at_the_end_of_backward(self._after_reduction)

    def _after_reduction(self) -> None:
        # DDP queues its own final callback during the backward pass; one queued from a final callback runs after it,
        # so that every process sees the reduced gradients and decides alike.
        _at_the_end_of_backward(self._after_backward)

    def _after_backward(self) -> None:
        self._queued = False
        self._unseen = True
        if GradientState().sync_gradients:  # the last micro-batch of the step: the others' sum is in the gradients
            self.check()

    @torch.no_grad()
    def check(self) -> None:
        """Looks at all gradients and clears those of the units that hold a non-finite one."""
        self._unseen = False
        present = tuple(i for i, parameter in enumerate(self._parameters) if parameter.grad is not None)
        if not present:
            return
        gradients = [self._gradient(i) for i in present]
        # In float16 the norm itself could overflow.
        dtype = torch.float32 if any(g.dtype == torch.float16 for g in gradients) else None
        norms = torch.stack([n.to(self._home, torch.float32) for n in torch._foreach_norm(gradients, 2, dtype)])
        units = self._units_of(present)
        bad = torch.zeros(len(self.names), device=self._home)
        live = bad.clone()
        bad.index_add_(0, units, (~norms.isfinite()).float())
        live.index_add_(0, units, (norms > 0).float())
        if self._sharded:
            all_reduce_sum(bad), all_reduce_sum(live)
        if not self.protecting:  # a loss scaler meets infinities by design, skips such a step itself, and must see them
            self._bad, self._live = bad > 0, (live > 0) & (bad == 0)
            return
        self._bad |= bad > 0
        self._live = (live > 0) & ~self._bad
        if not self._on_host:
            self._clear_on_device(present, gradients)
        elif bool(self._bad.any()):
            for i, gradient in zip(present, gradients, strict=True):
                if self._bad[self._unit_of[i]]:
                    gradient.zero_()

    def _gradient(self, index: int) -> Tensor:
        gradient = self._parameters[index].grad
        assert gradient is not None
        return local(gradient)

    def _units_of(self, present: tuple[int, ...]) -> Tensor:
        if present not in self._index_cache:
            self._index_cache[present] = torch.tensor([self._unit_of[i] for i in present], device=self._home)
        return self._index_cache[present]

    def _clear_on_device(self, present: tuple[int, ...], gradients: list[Tensor]) -> None:
        for i, gradient in zip(present, gradients, strict=True):
            gradient.masked_fill_(self._bad[self._unit_of[i]].to(gradient.device, non_blocking=True), 0.0)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._unseen:  # a loop that accumulates by itself and told accelerate otherwise
            self.check()
        if not self.protecting:
            return
        if self._on_host:
            if bool(self._bad.any()):
                for i, parameter in enumerate(self._parameters):
                    if self._bad[self._unit_of[i]]:
                        parameter.grad = None  # the optimizer passes over it: no decay, no momentum, no step count
            return
        self._saved = [(t, t.clone(), unit) for t, unit in self._tensors(optimizer)]
        self._fresh = [i for i, parameter in enumerate(self._parameters) if not optimizer.state.get(parameter)]

    def _tensors(self, optimizer: Optimizer) -> list[tuple[Tensor, int]]:
        """Parameters and their optimizer state on their device, with the unit each belongs to."""
        found: list[tuple[Tensor, int]] = []
        for parameter, unit in zip(self._parameters, self._unit_of, strict=True):
            found.append((local(parameter.data), unit))
            found += [(t, unit) for t in _state_on_device(optimizer, parameter)]
        return found

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for tensor, saved, unit in self._saved:
            tensor.copy_(torch.where(self._bad[unit].to(tensor.device, non_blocking=True), saved, tensor))
        for i in self._fresh if self._saved else []:
            for tensor in _state_on_device(
                optimizer, self._parameters[i]
            ):  # it did not exist before: zero is untouched
                tensor.masked_fill_(self._bad[self._unit_of[i]].to(tensor.device, non_blocking=True), 0)
        self._saved, self._fresh = [], []
        self.steps += 1
        self._skipped += self._bad
        if any(float(group["lr"]) > 0 for group in optimizer.param_groups):
            self._exercised |= self._live & ~self._bad
        self._bad = torch.zeros_like(self._bad)
        self._live = torch.zeros_like(self._live)


def _state_on_device(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    # AdamW that is neither fused nor capturable counts steps on the host: that count alone moves on in a skipped step.
    state = optimizer.state.get(parameter, {})
    tensors = [local(value) for value in state.values() if isinstance(value, Tensor)]
    return [tensor for tensor in tensors if tensor.device == parameter.device]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor (the same memory), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _at_the_end_of_backward(function: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)
