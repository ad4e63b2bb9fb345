"""A plain LoRA on a tiny model, schedules made for it by hand, and a bare training loop around them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.adapters.attach import AdaptedLayer, adapted_layers, attach_lora
from rankwise.adapters.perturbation import RowNoise
from rankwise.adapters.state import FactorPair
from rankwise.adapters.targets import resolve_targets
from rankwise.errors import ConfigError
from rankwise.linalg.random import generator
from rankwise.methods.base import Method
from rankwise.methods.perturbing import PerturbationSchedule
from rankwise.methods.schedule import Scene
from rankwise.ranks.plan import RankPlan
from tests.support.models import causal_batch, tiny_llama

BATCHES = [causal_batch(seed, rows=4) for seed in range(4)]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@dataclass
class Adapted:
    """A model with a plain LoRA and the layers it lies on."""

    model: Any
    layers: Mapping[str, AdaptedLayer]

    @property
    def factors(self) -> list[torch.nn.Parameter]:
        return [factor for layer in self.layers.values() for factor in (layer.lora_A, layer.lora_B)]

    @property
    def first(self) -> AdaptedLayer:
        return next(iter(self.layers.values()))

    def schedule(
        self, method: Method, *, seed: int = 0, offsets: Mapping[str, FactorPair] | None = None
    ) -> PerturbationSchedule:
        scene = Scene(model=self.model, layers=self.layers, seed=seed, offsets=offsets or {})
        made = method.make_schedule(scene)
        assert isinstance(made, PerturbationSchedule)
        return made

    def adamw(self, lr: float = 1e-2) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.factors, lr=lr)


def adapted(
    model: PreTrainedModel | None = None,
    *,
    dropout: float = 0.0,
    rank: int = 3,
    targets: Sequence[str] = TARGETS,
    spread: float = 0.0,
) -> Adapted:
    """A LoRA of one rank on the targets, in training mode; `spread` is the standard deviation of lora_B."""
    base = tiny_llama() if model is None else model
    found = resolve_targets(base, list(targets))
    plan = RankPlan.from_shapes(found.shapes, [rank] * len(found.shapes), r=rank, lora_alpha=2.0 * rank)
    peft_model = attach_lora(base, plan, lora_dropout=dropout)
    peft_model.train()
    layers = adapted_layers(peft_model)
    for name, layer in layers.items():
        if spread:
            layer.lora_B.data.normal_(std=spread, generator=generator(1, "test", name))
    return Adapted(peft_model, layers)


def train(
    one: Adapted,
    schedule: PerturbationSchedule | None,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[int],
    *,
    micro_batches: int = 1,
    max_norm: float = 1.0,
) -> list[Tensor]:
    """The bare loop; the losses of its steps (of the whole batch)."""
    losses = []
    for step in steps:
        batch = BATCHES[step % len(BATCHES)]
        if schedule is not None:
            schedule.before_step(step)
        total = torch.zeros(())
        for part in range(micro_batches):
            rows = slice(part * 4 // micro_batches, (part + 1) * 4 // micro_batches)
            loss = one.model(**{key: value[rows] for key, value in batch.items()}).loss / micro_batches
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(one.factors, max_norm)
        if schedule is not None:
            schedule.before_optimizer_step(step)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.after_step(step)
        losses.append(total)
    return losses


def trajectory(
    method: Method | None, steps: int = 6, *, micro_batches: int = 1, seed: int = 0, **options: Any
) -> list[Tensor]:
    """Losses and final factors of a run; None is plain LoRA."""
    one = adapted(**options)
    optimizer = one.adamw()
    schedule = None
    if method is not None:
        schedule = one.schedule(method, seed=seed)
        schedule.begin(optimizer, steps)
    losses = train(one, schedule, optimizer, range(1, steps + 1), micro_batches=micro_batches)
    if schedule is not None:
        schedule.end(steps)
        schedule.close()
    return [*losses, *(factor.detach().clone() for factor in one.factors)]


def noise_on(layer: AdaptedLayer) -> Tensor:
    """E [out, in] as the perturbed base layer computes it now: its output for the unit vectors, less W."""
    module: Any = layer.base.module
    unit = torch.eye(layer.base.shape.in_features, dtype=module.weight.dtype)
    with torch.no_grad():
        output = module(unit) - (0 if module.bias is None else module.bias)
    return output.T - layer.base.weight(module.weight.dtype)


def std_of(schedule: PerturbationSchedule, name: str) -> Tensor:
    """The standard deviations that act on a layer now."""
    noise = schedule.perturbations[name]
    assert isinstance(noise, RowNoise)
    return noise.std


def merged(layer: AdaptedLayer, offset: FactorPair | None = None) -> Tensor:
    """W' = W + s (B A - B0 A0), dense, float64."""
    update = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    if offset is not None:
        update = update - offset.lora_B.double() @ offset.lora_A.double()
    return layer.base.weight().double() + layer.scaling * update


def surrogate(layer: AdaptedLayer) -> Tensor:
    """G^ = s (dB A + B dA), dense, float64."""
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    return layer.scaling * (layer.lora_B.grad.double() @ A + B @ layer.lora_A.grad.double())


def faults_of(kind: type[Method], **wrong: object) -> tuple[str, ...]:
    try:
        kind(**wrong)
    except ConfigError as error:
        return error.faults
    return ()
