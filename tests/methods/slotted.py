"""An adapter with empty slots on a tiny model, as attach builds it for AB-LoRA, and the schedule on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.adapters.attach import AdaptedLayer, adapted_layers, attach_lora
from rankwise.adapters.slots import clear_slots
from rankwise.adapters.targets import resolve_targets
from rankwise.calibration.batches import Loss
from rankwise.linalg.random import generator
from rankwise.methods.ab_lora import ABLoRA, ABLoRASchedule
from rankwise.methods.schedule import Scene
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import ScalingRule, uniform_budget
from tests.methods.perturbed import BATCHES, TARGETS, train
from tests.support.models import causal_batch, tiny_llama

__all__ = ["VALIDATION", "Slotted", "run", "slotted"]

VALIDATION = [causal_batch(100, rows=4)]


@dataclass
class Slotted:
    """A model, its layers, and the method whose slots they have."""

    model: Any
    layers: Mapping[str, AdaptedLayer]
    method: ABLoRA
    seed: int = 0

    @property
    def factors(self) -> list[torch.nn.Parameter]:
        return [factor for layer in self.layers.values() for factor in (layer.lora_A, layer.lora_B)]

    def schedule(self, validation: Sequence[Any] | None = None, loss: Loss | None = None) -> ABLoRASchedule:
        batches = VALIDATION if validation is None else validation
        scene = Scene(model=self.model, layers=self.layers, seed=self.seed, validation=batches, loss=loss)
        made = self.method.make_schedule(scene)
        assert isinstance(made, ABLoRASchedule)
        return made

    def adamw(self, lr: float = 1e-2) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.factors, lr=lr, weight_decay=0.1)

    def logits(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=BATCHES[0]["input_ids"]).logits
        return logits


def slotted(
    method: ABLoRA,
    *,
    rank: int = 3,
    spread: float = 0.0,
    base: PreTrainedModel | None = None,
    targets: Sequence[str] = TARGETS,
    dropout: float = 0.0,
) -> Slotted:
    """`rank` live slots a layer and the method's growth beside them; the scaling is that of `rank` (2)."""
    model = tiny_llama() if base is None else base
    shapes = resolve_targets(model, list(targets)).shapes
    slots = method.capacity(shapes, {shape.name: rank for shape in shapes})
    plan = RankPlan.from_shapes(
        shapes,
        [slots[shape.name] for shape in shapes],
        r=rank,
        lora_alpha=2.0 * rank,
        scaling_rule=ScalingRule.ALPHA_OVER_R,
        budget=uniform_budget(shapes, max(slots.values())),
    )
    peft_model = attach_lora(model, plan, lora_dropout=dropout)
    peft_model.train()
    layers = adapted_layers(peft_model)
    for name, layer in layers.items():
        assert layer.scaling == 2.0
        if spread:
            layer.lora_B.data.normal_(std=spread, generator=generator(1, "test", name))
        clear_slots(None, layer, range(rank, layer.rank))
    return Slotted(peft_model, layers, method)


def run(one: Slotted, schedule: ABLoRASchedule, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> None:
    """The bare loop over one's model."""
    train(one, schedule, optimizer, steps)  # type: ignore[arg-type]
