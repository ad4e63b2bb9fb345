"""AdamW with groups of gates beside it, which a method's own rule moves after everything else."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW

from rankwise.errors import ConfigError

__all__ = ["GATE", "GateRule", "GatedAdamW"]

GATE = "gate"
"""The `kind` of a group of gates."""


class GateRule(Protocol):
    """How gates move."""

    def __call__(self, gate: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """One step of one gate tensor with a gradient, in place; `state` is empty before its first step."""
        ...


class GatedAdamW(AdamW):
    """AdamW over ordinary groups, and a rule over the groups of kind `gate`, in one step and one state.

    Being one optimizer, a loss scaler, a scheduler and a checkpoint treat both alike: gates are unscaled, skipped,
    decayed in their rate and saved with the rest.

    Args:
        params: groups; those with `"kind": "gate"` hold gates.
        rule: moves one gate tensor.
        options: AdamW's.

    Raises:
        ConfigError: no group of gates.
    """

    def __init__(self, params: Iterable[dict[str, Any]], rule: GateRule, **options: Any) -> None:
        super().__init__(params, **options)
        self._rule = rule
        # A fused AdamW skips an overflowed step inside its kernel; the gates must skip it too, so the scaler does it.
        self._step_supports_amp_scaling = False
        plain = [group for group in self.param_groups if group.get("kind") != GATE]
        if len(plain) == len(self.param_groups):
            raise ConfigError("there are no gates to move: use AdamW")
        self._plain = AdamW(plain, **options)  # a step through super() would call every step hook twice

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the gates move after all other parameters.

        Args:
            closure: computes the loss and the gradients again; called once, with gradients on.

        Returns:
            The closure's loss, or None.
        """
        self._plain.state = self.state
        self._plain.param_groups = [group for group in self.param_groups if group.get("kind") != GATE]
        loss = self._plain.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                if group.get("kind") == GATE:
                    for gate in group["params"]:
                        if gate.grad is not None:
                            self._rule(gate, self.state[gate], group)
        return loss
