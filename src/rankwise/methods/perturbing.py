"""A schedule that perturbs the layers around the passes of a step: what GGPO and MGPO share."""

import logging
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.perturbation import LowRank, PerturbedLayer, RowNoise, without_autocast
from rankwise.errors import CheckpointError, ConfigError
from rankwise.methods.schedule import ScheduleFault, SteadyRanks

__all__ = ["PerturbationRule", "PerturbationSchedule", "like", "state_faults"]

logger = logging.getLogger(__name__)

_REPORT_EVERY = 100


class PerturbationRule(Protocol):
    """What to perturb by, and what to learn for it from the gradients of a step."""

    @property
    def layers(self) -> Mapping[str, AdaptedLayer]:
        """The layers that are perturbed; none where the settings ask for plain LoRA."""
        ...

    @property
    def perturbed(self) -> Mapping[str, PerturbedLayer]:
        """The switches of these layers."""
        ...

    def begin(self, optimizer: Optimizer, max_steps: int, step: int) -> None:
        """Before the first step, after `load`; `step` steps were made before."""

    def switch_on(self, step: int) -> None:
        """Fixes the perturbation of a step and puts it on the layers."""

    def switch_off(self) -> None:
        """The layers compute plainly."""

    def learn(self) -> bool:
        """Reads the gradients, once a step; false if it needs some and no layer had any."""
        ...

    def remarks(self) -> tuple[str, ...]:
        """What shows of the layers and the optimizer once training begins."""
        ...

    def memory_bytes(self) -> int:
        """What is kept, and held within a step."""
        ...

    def figures(self, layers: Collection[str]) -> dict[str, float]:
        """The last perturbation of these layers in numbers; waits for the device."""
        ...

    def lost(self) -> bool:
        """Whether a layer ever sat a step out because a norm was not finite; waits for the device."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What has to be kept for a resumed run."""
        ...

    def load(self, state: Mapping[str, Any]) -> list[str]:
        """Goes on from `state`, or says what is wrong with it."""
        ...

    def close(self) -> None:
        """Takes every hook off the model."""


class PerturbationSchedule(SteadyRanks):
    """Switches a rule on before the passes of a step and off before the optimizer, and lets it learn from gradients.

    It is off in evaluation, saving and generation; while it is on, layers in evaluation mode compute plainly too. All
    micro-batches of a step meet the same perturbation.

    Args:
        method_id: whose rule it is.
        rule: what to perturb by.
    """

    def __init__(self, method_id: str, rule: PerturbationRule) -> None:
        self._id, self._rule = method_id, rule
        self._on_for: int | None = None
        self._step = 0
        self._idle_step: int | None = None
        self._warned: set[str] = set()
        self.acted: frozenset[str] = frozenset()
        """The layers whose passes were perturbed in the last step."""

    def begin(self, optimizer: Optimizer, max_steps: int) -> None:
        """Refuses what cannot work, and moves what was computed at attach to where the model is now.

        Raises:
            ConfigError: an engine or a wrapper that keeps gradients or factors to itself, or an optimizer that the rule
                cannot go with.
            CheckpointError: the rule needs a part that the checkpoint does not have.
        """
        _refuse_engines(self._id, optimizer, self._rule.layers)
        self._rule.begin(optimizer, max_steps, self._step)
        for text in self._rule.remarks():
            logger.info("%s", text)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Fixes the perturbation of this step; a second call within the step changes nothing."""
        if self._on_for != step:
            self._switch_off()  # a step that an exception ended
            with self._exactly():
                self._rule.switch_on(step)
            for one in self._rule.perturbed.values():
                one.acted = False
            self._on_for = step

    @torch.no_grad()
    def before_optimizer_step(self, step: int) -> None:
        """Switches off, then takes the norms of the clipped gradients."""
        on = bool(self.perturbations)
        self._switch_off()
        self.acted = frozenset(name for name, one in self._rule.perturbed.items() if on and one.acted)
        if on and not self.acted and self._idle_step is None:
            self._idle_step = step
        with self._exactly():
            learned = self._rule.learn()
        fault = self.fault()
        if learned and fault is not None:
            self._warn(f"{fault.message}: {fault.advice}")
        if not learned:
            self._warn(
                "no layer had a gradient before the optimizer's step: is `before_optimizer_step` called after it, or "
                "does an engine keep the gradients?"
            )
        self._step = step

    def after_step(self, step: int) -> None:
        """Figures for the log at steps 2 and 10, and at each hundredth."""
        self._switch_off()
        if step in (2, 10) or step % _REPORT_EVERY == 0:
            self._report(step)

    def end(self, step: int) -> None:
        """The figures of the last step."""
        self._switch_off()
        self._report(step)

    def close(self) -> None:
        """Takes every hook off the model."""
        self._switch_off()
        self._rule.close()

    @property
    def perturbations(self) -> dict[str, RowNoise | LowRank]:
        """What acts on each layer now; nothing between steps."""
        return {name: one.by for name, one in self._rule.perturbed.items() if one.by is not None}

    def figures(self) -> dict[str, float]:
        """The last step's perturbation in numbers, their names led by the method's id; waits for the device.

        They are of the layers that acted; within a step, of those that are switched on.
        """
        found = self._rule.figures(self.acted if self._on_for is None else self.perturbations.keys())
        return {f"{self._id}_{name}": value for name, value in found.items()}

    def remarks(self) -> tuple[str, ...]:
        """What shows of the layers and the optimizer once training begins."""
        return self._rule.remarks()

    def fault(self) -> ScheduleFault | None:
        """A step in which the perturbation was on and no layer computed with it."""
        if self._idle_step is None:
            return None
        return ScheduleFault(
            f"no layer computed with the perturbation of step {self._idle_step}: layers in evaluation mode, or whose "
            "adapter is disabled or merged, compute plainly",
            "call session.model.train() before the passes of a step, and leave the adapter on in them",
        )

    def memory_bytes(self) -> int:
        """What the rule keeps, and holds within a step."""
        return self._rule.memory_bytes()

    def state_dict(self) -> dict[str, Any]:
        """The method's id, the step, and the rule's tensors."""
        return {"method": self._id, "step": self._step, **self._rule.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`.

        Raises:
            CheckpointError: a part is missing, of another method or of another plan; every fault is named.
        """
        if state.get("method") != self._id:
            raise CheckpointError(
                f"the schedule's state is of {state.get('method')!r}, the run is {self._id}: resume with the methods "
                "of the checkpoint"
            )
        faults = self._rule.load({name: value for name, value in state.items() if name not in ("method", "step")})
        step = state.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            faults.append("step is missing")
        if faults:
            more = f" (and {len(faults) - 8} more)" if len(faults) > 8 else ""
            raise CheckpointError(
                f"the state of {self._id} is not this plan's: {'; '.join(faults[:8])}{more}: take the state of the "
                "run's own checkpoint"
            )
        self._step = int(state["step"])

    def _exactly(self) -> AbstractContextManager[Any]:
        """A loop may call a step's start under autocast; norms are not for 16 bits."""
        layer = next(iter(self._rule.layers.values()), None)
        return without_autocast("cpu" if layer is None else layer.lora_A.device.type)

    def _switch_off(self) -> None:
        if self._on_for is not None:
            self._rule.switch_off()
            self._on_for = None

    def _report(self, step: int) -> None:
        if self._rule.lost():
            self._warn(
                "norms of weights or momenta were NaN or infinite, and their layers were not perturbed in such steps: "
                "look for overflow in the gradients or the base weights"
            )
        found = self.figures()
        if found:
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.3g}" for name, value in found.items()))

    def _warn(self, text: str) -> None:
        """Says it once in a run."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s: %s", self._id, text)


def state_faults(expected: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    """What is missing, of another shape or of no use in `state`, beside the tensors that are expected."""
    faults = [f"{name} is missing" for name in expected if not isinstance(state.get(name), Tensor)]
    faults += [
        f"{name} has the shape {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if isinstance(state.get(name), Tensor) and state[name].shape != value.shape
    ]
    return faults + [f"{name} belongs to no layer" for name in state if name not in expected]


def like(value: Tensor, old: Tensor) -> Tensor:
    """A copy of `value` on the device of `old`."""
    return value.detach().to(old.device, copy=True)


def _refuse_engines(method_id: str, optimizer: Optimizer, layers: Mapping[str, AdaptedLayer]) -> None:
    engine = next((kind for kind in type(optimizer).__mro__ if kind.__module__.startswith("deepspeed.runtime")), None)
    if engine is not None and layers:
        raise ConfigError(
            f"{method_id} reads the clipped gradients of lora_A and lora_B before each step, and under DeepSpeed "
            f"({engine.__name__}) the engine keeps them in partitions of its own: train with DDP or FSDP2"
        )
    for name, layer in layers.items():
        found = (*layer.lora_A.shape, *layer.lora_B.shape)
        shape = layer.base.shape
        if found != (layer.rank, shape.in_features, shape.out_features, layer.rank):
            raise ConfigError(
                f"{name}: lora_A is {list(layer.lora_A.shape)} and lora_B {list(layer.lora_B.shape)}, not the layer's "
                f"whole factors of rank {layer.rank}: {method_id} cannot work with factors flattened or partitioned by "
                "FSDP1 or DeepSpeed ZeRO-3: train with DDP or FSDP2 (fully_shard)"
            )
