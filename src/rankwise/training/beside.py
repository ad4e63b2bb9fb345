"""What acts beside the factors of a session: the offset of its start and its schedule, made by attach and by resume."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.offset import LiveOffset
from rankwise.adapters.state import FactorPair
from rankwise.calibration.batches import Loss
from rankwise.errors import ConfigError
from rankwise.methods.recipe import Recipe
from rankwise.methods.schedule import Scene, Schedule
from rankwise.ranks.plan import RankPlan

__all__ = ["kept_validation", "make_schedule", "planned_slots", "put_offset", "start_pairs"]


def kept_validation(recipe: Recipe, validation: Iterable[Any] | None) -> list[Any] | None:
    """The validation batches as a list, if the recipe's schedule scores on them.

    Raises:
        ConfigError: they are missing, empty, or nobody would read them.
    """
    owner = recipe.schedule
    needed = owner is not None and owner.needs_validation
    if validation is None:
        if needed and owner is not None:
            raise ConfigError(f"{owner.id} scores on validation batches: pass validation=batches, with labels")
        return None
    if not needed:
        raise ConfigError(
            f"validation batches are for schedules that score, and {'+'.join(recipe.ids)} has none: leave them out"
        )
    kept = list(validation)
    if not kept:
        raise ConfigError("validation holds no batch: give at least one, with labels")
    return kept


def planned_slots(recipe: Recipe, plan: RankPlan) -> dict[str, int]:
    """By layer, the slots that the adapter is built with: the plan's ranks, and room for those that may come."""
    ranks, owner = plan.ranks, recipe.schedule
    return ranks if owner is None else owner.capacity([layer.shape for layer in plan.layers], ranks)


def start_pairs(layers: Mapping[str, AdaptedLayer]) -> dict[str, FactorPair]:
    """The factors as they are stored now, float32 on the CPU; layers whose update is zero need no offset."""
    pairs = {}
    for name, layer in layers.items():
        lora_A, lora_B = (
            factor.detach().to("cpu", torch.float32, copy=True) for factor in (layer.lora_A, layer.lora_B)
        )
        if bool(lora_A.any()) and bool(lora_B.any()):
            pairs[name] = FactorPair(lora_A, lora_B)
    return pairs


def put_offset(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], recipe: Recipe, pairs: Mapping[str, FactorPair] | None = None
) -> LiveOffset | None:
    """The offset in place, where the recipe's start is subtracted again; None where it is not.

    Args:
        model: the attached model.
        layers: its adapted layers.
        recipe: whose start it is.
        pairs: what is subtracted; by default the factors as they are now.

    Raises:
        ArtifactError: a pair that does not fit its layer.
        ConfigError: `base` on weights that are quantized or sharded.
    """
    place = recipe.initialize.offset_place
    return (
        None if place == "none" else LiveOffset(model, layers, start_pairs(layers) if pairs is None else pairs, place)
    )


def make_schedule(
    recipe: Recipe,
    model: nn.Module,
    layers: Mapping[str, AdaptedLayer],
    seed: int,
    *,
    offset: LiveOffset | None,
    validation: Sequence[Any] | None,
    loss: Loss | None,
) -> Schedule | None:
    """The recipe's schedule, its hooks on the model; None where nothing acts around steps. On a fault nothing stays.

    Raises:
        ConfigError: the schedule cannot act on this model.
    """
    if recipe.schedule is None:
        return None
    scene = Scene(
        model=model,
        layers=layers,
        seed=seed,
        # `base` has subtracted them from the weights that the schedule sees.
        offsets={} if offset is None or offset.place == "base" else offset.pairs,
        validation=validation,
        loss=loss,
    )
    try:
        return recipe.schedule.make_schedule(scene)
    except BaseException:
        if offset is not None:
            offset.close()
        raise
