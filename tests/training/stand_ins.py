"""Small methods that fill a slot in the simplest way, to test what carries any method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rankwise.errors import CheckpointError, ConfigError
from rankwise.methods.base import Method, Slot
from rankwise.methods.schedule import Scene, SteadyRanks
from rankwise.ranks.shapes import LayerShape


class Counter(SteadyRanks):
    """A schedule that counts its steps and adds up the gradients that it sees, from the first layer's lora_B."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.layer = next(iter(scene.layers.values()))
        self.steps = 0
        self.seen: list[Tensor] = []
        self.total = torch.zeros_like(self.layer.lora_B)
        self.optimizer: Optimizer | None = None
        self.calls = 0
        self.handles: list[RemovableHandle] = [scene.model.register_forward_hook(self._called)]

    def _called(self, *_: Any) -> None:
        self.calls += 1

    def begin(self, optimizer: Optimizer, max_steps: int) -> None:
        self.optimizer = optimizer

    def before_step(self, step: int) -> None: ...

    def before_optimizer_step(self, step: int) -> None:
        assert self.layer.lora_B.grad is not None
        self.seen.append(self.layer.lora_B.grad.detach().clone())
        self.total += self.seen[-1]

    def after_step(self, step: int) -> None:
        self.steps += 1

    def end(self, step: int) -> None: ...

    def figures(self) -> dict[str, float]:
        return {"counting_steps": float(self.steps)}

    def remarks(self) -> tuple[str, ...]:
        return ()

    def fault(self) -> None: ...

    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "total": self.total.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.keys() != {"steps", "total"}:
            raise CheckpointError(f"counter: {sorted(state)} is not its state")
        self.steps = int(state["steps"])
        self.total.copy_(state["total"])


@dataclass(frozen=True, kw_only=True)
class Counting(Method):
    """Fills the schedule slot with a `Counter`."""

    id: ClassVar[str] = "counting"
    title: ClassVar[str] = "Counting"
    source: ClassVar[str] = "none"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.SCHEDULE})
    learning_rates: ClassVar[tuple[float, float, float]] = (1e-5, 1e-4, 1e-3)

    refuses: bool = False

    def make_schedule(self, scene: Scene) -> Counter:
        if self.refuses:
            raise ConfigError("counting.refuses: true")
        return Counter(scene)


@dataclass(frozen=True, kw_only=True)
class Scoring(Counting):
    """A schedule that scores on validation batches."""

    id: ClassVar[str] = "scoring"
    needs_validation: ClassVar[bool] = True


class Descent(torch.optim.SGD):
    """Gradient descent over pairs and plain groups alike."""


@dataclass(frozen=True, kw_only=True)
class Descending(Method):
    """Fills the optimize slot with gradient descent; says that its state takes `needed` bytes a layer."""

    id: ClassVar[str] = "descending"
    title: ClassVar[str] = "Descending"
    source: ClassVar[str] = "none"
    slots: ClassVar[frozenset[Slot]] = frozenset({Slot.OPTIMIZE})
    learning_rates: ClassVar[tuple[float, float, float]] = (1e-5, 1e-4, 1e-3)
    unclipped: ClassVar[bool] = True
    leaner: ClassVar[str] = "descending.needed: 0"

    beta1: float = 0.5
    needed: int | None = None

    def make_optimizer(self, groups: Sequence[dict[str, Any]], *, lr: float) -> Descent:
        return Descent(groups, lr=lr)

    def state_bytes(self, ranks: Mapping[LayerShape, int]) -> int | None:
        return None if self.needed is None else self.needed * len(ranks)
