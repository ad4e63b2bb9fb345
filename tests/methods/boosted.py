"""A LoRA of a booster's rank on a tiny model, its rounds made by hand, and a bare training loop around them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from rankwise.methods.schedule import Scene
from rankwise.methods.xgblora import BoostingSchedule, XGBLoRA
from tests.methods.perturbed import BATCHES, Adapted
from tests.support.models import causal_batch

HELD_OUT = causal_batch(99, rows=3)


def boosted(one: Adapted, method: XGBLoRA, *, seed: int = 0) -> BoostingSchedule:
    made = method.make_schedule(Scene(model=one.model, layers=one.layers, seed=seed))
    assert isinstance(made, BoostingSchedule)
    return made


def begun(
    one: Adapted, method: XGBLoRA, steps: int, *, seed: int = 0, **options: Any
) -> tuple[BoostingSchedule, Optimizer]:
    schedule = boosted(one, method, seed=seed)
    optimizer = AdamW(one.factors, **{"lr": 1e-2, **options})
    schedule.begin(optimizer, steps)
    return schedule, optimizer


def train(
    one: Adapted,
    schedule: BoostingSchedule | None,
    optimizer: Optimizer,
    steps: Sequence[int],
    *,
    within: Callable[[int], None] = lambda step: None,
    after: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    """The bare loop; the losses of its steps. `within` is called before the optimizer, `after` before the schedule."""
    losses = []
    for step in steps:
        if schedule is not None:
            schedule.before_step(step)
        loss = one.model(**BATCHES[step % len(BATCHES)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(one.factors, 1.0)
        if schedule is not None:
            schedule.before_optimizer_step(step)
        within(step)
        optimizer.step()
        optimizer.zero_grad()
        after(step)
        if schedule is not None:
            schedule.after_step(step)
        losses.append(loss.detach())
    return losses


def logits(one: Adapted) -> Tensor:
    """In evaluation mode, of rows that no step saw."""
    one.model.eval()
    with torch.no_grad():
        found: Tensor = one.model(input_ids=HELD_OUT["input_ids"]).logits
    one.model.train()
    return found


def relative(found: Tensor, reference: Tensor) -> float:
    return ((found - reference).abs().max() / reference.abs().max()).item()
