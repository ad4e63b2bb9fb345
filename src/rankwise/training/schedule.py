"""What happens around steps: the protocol that every schedule, the callback and a bare loop share."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch.optim import Optimizer

__all__ = ["Schedule"]


@runtime_checkable
class Schedule(Protocol):
    """One schedule of a session; steps count optimizer steps from 1, whatever the accumulation.

    The order within a step: `before_step`, all micro-batches, gradient clipping, `before_optimizer_step`, the
    optimizer, `after_step`, then logging, evaluation and saving.
    """

    def begin(self, optimizer: Optimizer, max_steps: int) -> None:
        """Before the first step (of a resumed run too, after `load_state_dict`); the optimizer is unwrapped."""

    def before_step(self, step: int) -> None:
        """Before the forward pass of step `step`."""

    def before_optimizer_step(self, step: int) -> None:
        """After clipping; gradients may be read."""

    def after_step(self, step: int) -> None:
        """After the optimizer, before logging, evaluation and saving."""

    def end(self, step: int) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready values and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
