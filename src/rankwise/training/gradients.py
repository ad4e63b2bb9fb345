"""Non-finite gradients: the pair they hit sits the step out, everything else trains on.

After the last backward pass of a step, and before anybody clips, the gradients of every unit (one pair of lora_A and
lora_B, or all of `modules_to_save`) are checked. A unit with a NaN or an infinity gets zero gradients, so that it does
not spoil the clip norm of the others, and the optimizer does not see the unit: its parameters and optimizer state leave
the step as they entered it. The norms stay on the device; one flag is read for each step, at the end of its last
backward pass, and only a step in which it is raised costs more. Of parameters sharded by FSDP2 each process looks at
its own part, and the findings are summed.
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
    """

    def __init__(self, units: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self.names = tuple(units)
        self._parameters = [parameter for unit in units.values() for parameter in unit]
        self._unit_of = [index for index, unit in enumerate(units.values()) for _ in unit]
        self._home = torch.device("cpu")  # `install` knows better: trainers move the model after attach
        self._sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters)
        self.protecting = True
        self.steps = 0
        zeros = torch.zeros(len(units))
        self._skipped = zeros.to(torch.int64)
        self._exercised = zeros.to(torch.bool)
        self._bad = zeros.to(torch.bool)
        self._live = zeros.to(torch.bool)
        self.untouched: tuple[str, ...] | None = None
        """Units that had no gradient at all, not even zeros, in the first step at a learning rate above 0."""
        self._found = False
        self._touched: frozenset[int] = frozenset()
        self._backward: int | None = None
        self._whole = False
        self._unseen = False
        self._order_cache: dict[tuple[int, ...], tuple[list[list[int]], Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def watches(self, units: Mapping[str, Sequence[nn.Parameter]]) -> bool:
        """Whether these are still the very parameters; FSDP puts others in their place."""
        live = [parameter for unit in units.values() for parameter in unit]
        return len(live) == len(self._parameters) and all(a is b for a, b in zip(live, self._parameters, strict=True))

    def install(self, optimizer: Optimizer, model: nn.Module | None = None) -> None:
        """Hooks the parameters' backward and the optimizer's step; a second call moves to another optimizer.

        Args:
            optimizer: the optimizer itself, no wrapper.
            model: whose outputs every backward pass starts from. Reentrant checkpointing runs a backward pass within
                the backward pass for each segment; with the model they are looked at together, once.
        """
        self.remove()
        self._move(self._parameters[0].device)
        if model is not None:
            self._handles.append(model.register_forward_hook(self._on_output))
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
        self._backward, self._whole = None, False

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

    def _move(self, home: torch.device) -> None:
        self._home = home
        self._skipped, self._exercised = self._skipped.to(home), self._exercised.to(home)
        self._bad, self._live = self._bad.to(home), self._live.to(home)
        self._order_cache = {}

    def _on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
        for value in values:
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(self._on_begin)  # type: ignore[no-untyped-call]

    def _on_begin(self, _: Tensor) -> None:
        """The outermost backward pass begins: what it contains is looked at at its end."""
        self._queue(whole=True)

    def _on_gradient(self, _: Tensor) -> None:
        self._unseen = True
        if not self._whole:
            self._queue(whole=False)

    def _queue(self, *, whole: bool) -> None:
        # Told apart by number: a backward pass that an exception ended leaves its mark, and must not stop the next one.
        current = torch._C._current_graph_task_id()  # type: ignore[attr-defined, unused-ignore]
        if current != self._backward:
            self._backward, self._whole = current, whole
            _at_the_end_of_backward(self._after_reduction)

    def _after_reduction(self) -> None:
        # DDP queues its own final callback during the backward pass; one queued from a final callback runs after it,
        # so that every process sees the reduced gradients and decides alike.
        _at_the_end_of_backward(self._after_backward)

    def _after_backward(self) -> None:
        self._backward, self._whole = None, False
        self._unseen = True
        if GradientState().sync_gradients:  # the last micro-batch of the step: the others' sum is in the gradients
            self.check()

    @torch.no_grad()
    def check(self) -> None:
        """Looks at all gradients and clears those of the units that hold a non-finite one."""
        self._unseen = False
        present = tuple(i for i, parameter in enumerate(self._parameters) if parameter.grad is not None)
        self._touched = frozenset(self._unit_of[i] for i in present)
        if not present:
            return
        groups, units = self._ordered(present)
        norms = torch.cat([self._norms(group) for group in groups])
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
        self._found = bool(self._bad.any())  # the one wait for the device in a step
        if self._found:
            self._clear(present)

    def _clear(self, present: Sequence[int]) -> None:
        bad = self._bad.tolist()
        for i in present:
            if bad[self._unit_of[i]]:
                self._gradient(i).zero_()

    def _norms(self, group: Sequence[int]) -> Tensor:
        """The norms of gradients of one device and dtype, in a handful of kernels however many they are."""
        gradients = [self._gradient(i) for i in group]
        # In float16 the norm itself could overflow.
        dtype = torch.float32 if gradients[0].dtype == torch.float16 else None
        return torch.stack(torch._foreach_norm(gradients, 2, dtype)).to(self._home, torch.float32)  # type: ignore[arg-type, unused-ignore]

    def _gradient(self, index: int) -> Tensor:
        gradient = self._parameters[index].grad
        assert gradient is not None
        return local(gradient)

    def _ordered(self, present: tuple[int, ...]) -> tuple[list[list[int]], Tensor]:
        """The parameters with a gradient in groups of one device and dtype, and the unit of each in that order."""
        if present not in self._order_cache:
            groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
            for i in present:
                gradient = self._gradient(i)
                groups.setdefault((gradient.device, gradient.dtype), []).append(i)
            units = [self._unit_of[i] for group in groups.values() for i in group]
            self._order_cache[present] = (list(groups.values()), torch.tensor(units, device=self._home))
        return self._order_cache[present]

    def withhold(self) -> frozenset[str]:
        """The units that sit this step out; from here on they have no gradient, so that nobody learns from one.

        Call it after clipping. Under a loss scaler that met infinities it is every unit, and their gradients stay for
        the scaler to see.
        """
        if self._unseen:  # a loop that accumulates by itself and told accelerate otherwise
            self.check()
        if not self.protecting:
            return frozenset(self.names) if bool(self._bad.any()) else frozenset()
        if not self._found:
            return frozenset()
        bad = self._bad.tolist()
        for parameter, unit in zip(self._parameters, self._unit_of, strict=True):
            if bad[unit]:
                parameter.grad = None  # the optimizer passes over it: no decay, no momentum, no step count
        return frozenset(name for name, out in zip(self.names, bad, strict=True) if out)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._unseen:
            self.check()
        if self.untouched is None and _rate(optimizer) > 0:
            touched = {self._unit_of[i] for i, p in enumerate(self._parameters) if p.grad is not None} | self._touched
            self.untouched = tuple(name for i, name in enumerate(self.names) if i not in touched)
        if self._found:
            self.withhold()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        self._skipped += self._bad
        if _rate(optimizer) > 0:
            self._exercised |= self._live & ~self._bad
        self._bad = torch.zeros_like(self._bad)
        self._live = torch.zeros_like(self._live)
        self._found = False


def _rate(optimizer: Optimizer) -> float:
    return max(float(group["lr"]) for group in optimizer.param_groups)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor (the same memory), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _at_the_end_of_backward(function: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)
