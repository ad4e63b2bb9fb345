"""Slots: single ranks of an adapter of fixed shape, emptied, copied and filled together with their optimizer state.

A slot is a row of lora_A and the column of lora_B of the same number. A schedule that moves ranks during training keeps
the shapes and edits slots; what the optimizer remembers of a slot must go with it, or momentum and decay would move a
slot whose gate is 0. The count of steps that AdamW keeps for a whole factor stays.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from rankwise.adapters.attach import AdaptedLayer
from rankwise.errors import ModelError

__all__ = ["clear_slots", "copy_slots", "fill_slots"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""What torch's Adam and AdamW keep of each entry."""


@torch.no_grad()
def clear_slots(optimizer: Optimizer | None, layer: AdaptedLayer, slots: Sequence[int]) -> None:
    """Zeroes rows of lora_A, columns of lora_B and their moments: gradients, momentum and decay leave them still.

    Args:
        optimizer: torch's Adam or AdamW, unwrapped; None where there is none yet.
        layer: whose slots they are.
        slots: each in [0, rank).

    Raises:
        ModelError: a slot that the layer does not have.
    """
    _refuse_strange(layer, slots)
    for tensor, rows in _parts(optimizer, layer):
        index = torch.tensor(slots, dtype=torch.long, device=tensor.device)
        tensor.index_fill_(0 if rows else 1, index, 0.0)


@torch.no_grad()
def copy_slots(optimizer: Optimizer | None, layer: AdaptedLayer, source: Sequence[int], target: Sequence[int]) -> None:
    """Copies the rows, columns and moments of `source` into `target`, pair by pair; all are read before any is written.

    Args:
        optimizer: torch's Adam or AdamW, unwrapped; None where there is none yet.
        layer: whose slots they are.
        source: slots to copy, each in [0, rank).
        target: as many slots to overwrite, none twice.

    Raises:
        ModelError: a slot that the layer does not have, a target named twice, or lists of two lengths.
    """
    _refuse_strange(layer, (*source, *target))
    if len(source) != len(target) or len(set(target)) < len(target):
        raise ModelError(f"{layer.name}: slots {list(source)} cannot be copied to {list(target)}, one to one")
    for tensor, rows in _parts(optimizer, layer):
        dim = 0 if rows else 1
        read = torch.tensor(source, dtype=torch.long, device=tensor.device)
        written = torch.tensor(target, dtype=torch.long, device=tensor.device)
        tensor.index_copy_(dim, written, tensor.index_select(dim, read))


@torch.no_grad()
def fill_slots(
    optimizer: Optimizer | None, layer: AdaptedLayer, slots: Sequence[int], rows: Float[Tensor, "slots in"]
) -> None:
    """Writes new rows of lora_A beside zero columns of lora_B and zero moments: the update stays what it was.

    Args:
        optimizer: torch's Adam or AdamW, unwrapped; None where there is none yet.
        layer: whose slots they are.
        slots: each in [0, rank).
        rows: the new rows, in the order of `slots`; rounded to the adapter's dtype.

    Raises:
        ModelError: a slot that the layer does not have, or rows of another number or length.
    """
    if rows.shape != (len(slots), layer.lora_A.shape[1]):
        raise ModelError(
            f"{layer.name}: rows of shape {tuple(rows.shape)} for {len(slots)} slots of {layer.lora_A.shape[1]} inputs"
        )
    clear_slots(optimizer, layer, slots)
    target = layer.lora_A
    index = torch.tensor(slots, dtype=torch.long, device=target.device)
    target.index_copy_(0, index, rows.to(target.device, target.dtype))


def _parts(optimizer: Optimizer | None, layer: AdaptedLayer) -> Iterator[tuple[Tensor, bool]]:
    """Every tensor that holds slots, and whether they are its rows (else its columns)."""
    for factor, rows in ((layer.lora_A, True), (layer.lora_B, False)):
        yield factor, rows
        state = {} if optimizer is None else optimizer.state.get(factor, {})
        for name in _MOMENTS:
            moment = state.get(name)
            if isinstance(moment, Tensor):
                yield moment, rows


def _refuse_strange(layer: AdaptedLayer, slots: Sequence[int]) -> None:
    strange = [slot for slot in slots if not 0 <= slot < layer.rank]
    if strange:
        raise ModelError(f"{layer.name} has slots 0 to {layer.rank - 1}, not {strange[0]}")
