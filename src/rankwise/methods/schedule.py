"""What happens around steps: the protocol that every schedule, the callback and a bare loop share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.state import FactorPair, FoldState
from rankwise.calibration.batches import Loss
from rankwise.optimizers.gated import GateRule

__all__ = ["RankEvent", "Scene", "Schedule", "ScheduleFault", "SteadyRanks", "stage_ends"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """What a schedule acts on: the attached model as it stands before the first step.

    Args:
        model: the attached model, not wrapped for distributed training.
        layers: the adapted layers by full name, in the model's order.
        seed: the run's seed; draws come from `linalg.random.generator(seed, purpose, ...)`.
        offsets: by layer, the pair that is subtracted beside the live one (LoRA-GA's start).
        validation: batches for schedules that score.
        loss: `loss(model, batch) -> (mean loss, weight)` if the model's own does not serve.
    """

    model: nn.Module
    layers: Mapping[str, AdaptedLayer]
    seed: int
    offsets: Mapping[str, FactorPair] = field(default_factory=dict)
    validation: Sequence[Any] | None = None
    loss: Loss | None = None


@dataclass(frozen=True, slots=True)
class ScheduleFault:
    """Why what a schedule does never reached the model, and what to do about it."""

    message: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEvent:
    """One change of the ranks that count, as `ranks.jsonl` records it.

    Args:
        step: optimizer steps made when it happened.
        kind: what happened, in one word ("prune", "reallocate", "reset", "fold").
        ranks: the live ranks after it, of the layers that it changed.
        reason: a few words.
        figures: numbers of the whole event.
        layers: JSON-ready details by layer: the scores that decided, what was copied.
    """

    step: int
    kind: str
    ranks: Mapping[str, int]
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)


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
        """After clipping; gradients may be read, a loss scaler's factor taken out. A pair that sits the step out for a
        non-finite gradient has none; a step that all sit out (a loss scaler met infinities) passes without this call.
        """

    def after_step(self, step: int) -> None:
        """After the optimizer, before logging, evaluation and saving."""

    def end(self, step: int) -> None:
        """After the last step."""

    def owned_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of the parameters that the schedule brought (gates), which are in no other group.

        Args:
            lr: the run's learning rate.
            weight_decay: the run's decay of parameters that decay.
        """
        ...

    def gate_rule(self) -> GateRule | None:
        """What moves its groups of the kind `gate`; None where AdamW moves all that is trained."""
        ...

    def stages(self) -> int:
        """How many parts of the run (`stage_ends`) have a learning-rate schedule each; 1 for most."""
        ...

    def checkpoints(self, max_steps: int) -> tuple[int, ...]:
        """Steps after which a checkpoint, and an evaluation if there are any, are due whatever the trainer says."""
        ...

    def fold_state(self) -> FoldState:
        """The gates and boosters as they stand, for export and checkpoints."""
        ...

    def live_ranks(self) -> dict[str, int]:
        """By layer, how many ranks count now; empty where the ranks are the plan's throughout."""
        ...

    def events(self) -> tuple[RankEvent, ...]:
        """What changed since this was last asked."""
        ...

    def outlook(self, max_steps: int) -> tuple[str, ...]:
        """What it will do in a run of this length, one sentence each; asked before `begin`, and more than once.

        Raises:
            ConfigError: it cannot do its work in such a run.
        """
        ...

    def figures(self) -> dict[str, float]:
        """Numbers of the last step for the log, named after the method's id; may wait for the device."""
        ...

    def remarks(self) -> tuple[str, ...]:
        """What the user should know that shows only once training is set up; asked after `begin`."""
        ...

    def fault(self) -> ScheduleFault | None:
        """What kept the schedule from reaching the model in a step, if anything did; fails the run at its end."""
        ...

    def memory_bytes(self) -> int:
        """What it holds at the peak of a step, for a forecast; asked after a few steps."""
        ...

    def base_copy_bytes(self) -> int:
        """Bytes of base weights that it keeps on the CPU as they were found, because it writes them."""
        ...

    def event_seconds(self) -> float:
        """What its events still to come will take beyond steps, as far as was measured; asked after `begin`."""
        ...

    def close(self) -> None:
        """Takes every hook off the model; called any number of times."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready values and tensors, in one flat mapping; called in every process, process 0's is kept."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`.

        Raises:
            CheckpointError: the state is another schedule's, or a part is missing.
        """


def stage_ends(stages: int, max_steps: int) -> tuple[int, ...]:
    """The last step of each of `stages` parts of the run, as equal as whole steps allow."""
    return tuple(math.ceil(max_steps * (index + 1) / stages) for index in range(stages))


class SteadyRanks:
    """What a schedule answers that moves no rank and brings no parameter."""

    def owned_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """None."""
        return []

    def gate_rule(self) -> GateRule | None:
        """None."""
        return None

    def stages(self) -> int:
        """The run is one."""
        return 1

    def checkpoints(self, max_steps: int) -> tuple[int, ...]:
        """None beyond the trainer's."""
        return ()

    def fold_state(self) -> FoldState:
        """Nothing to fold."""
        return FoldState()

    def live_ranks(self) -> dict[str, int]:
        """The plan's."""
        return {}

    def events(self) -> tuple[RankEvent, ...]:
        """None."""
        return ()

    def outlook(self, max_steps: int) -> tuple[str, ...]:
        """Nothing to say beforehand."""
        return ()

    def base_copy_bytes(self) -> int:
        """None: the base weights are not written."""
        return 0

    def event_seconds(self) -> float:
        """Events cost next to nothing."""
        return 0.0
