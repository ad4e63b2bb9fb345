"""Slots: rows, columns and moments move together, the rest of the layer and of the optimizer stays."""

import pytest
import torch
from torch import Tensor

from rankwise.adapters.attach import AdaptedLayer
from rankwise.adapters.gates import RankGates
from rankwise.adapters.slots import clear_slots, copy_slots, fill_slots
from rankwise.errors import ModelError
from tests.methods.perturbed import Adapted, adapted, train

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _trained(amsgrad: bool = True) -> tuple[Adapted, AdaptedLayer, torch.optim.AdamW]:
    one = adapted(rank=4, spread=0.1)
    optimizer = torch.optim.AdamW(one.factors, lr=0.1, weight_decay=0.1, amsgrad=amsgrad)
    train(one, None, optimizer, range(2))
    return one, one.first, optimizer


def _slots(layer: AdaptedLayer, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that a slot has, one row a slot: [rank, ...]."""
    found = [layer.lora_A.detach(), layer.lora_B.detach().T]
    found += [optimizer.state[layer.lora_A][name] for name in MOMENTS if name in optimizer.state[layer.lora_A]]
    found += [optimizer.state[layer.lora_B][name].T for name in MOMENTS if name in optimizer.state[layer.lora_B]]
    return [part.clone() for part in found]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_clearing_empties_row_column_and_moments_of_its_slots_alone(amsgrad: bool) -> None:
    _, layer, optimizer = _trained(amsgrad)
    before, step = _slots(layer, optimizer), optimizer.state[layer.lora_A]["step"].clone()
    clear_slots(optimizer, layer, [1, 3])
    after = _slots(layer, optimizer)
    assert len(after) == (8 if amsgrad else 6)
    for old, new in zip(before, after, strict=True):
        assert not new[[1, 3]].any()
        assert torch.equal(new[[0, 2]], old[[0, 2]])
        assert old[[1, 3]].any()
    assert torch.equal(optimizer.state[layer.lora_A]["step"], step)


def test_copying_takes_moments_along_and_reads_before_it_writes() -> None:
    _, layer, optimizer = _trained()
    before = _slots(layer, optimizer)
    copy_slots(optimizer, layer, [0, 1], [1, 0])
    for old, new in zip(before, _slots(layer, optimizer), strict=True):
        assert torch.equal(new, old[[1, 0, 2, 3]])


def test_filling_writes_the_rows_beside_empty_columns_and_moments() -> None:
    _, layer, optimizer = _trained()
    rows = torch.randn(2, layer.lora_A.shape[1], generator=torch.Generator().manual_seed(0))
    before = _slots(layer, optimizer)
    fill_slots(optimizer, layer, [3, 0], rows)
    after = _slots(layer, optimizer)
    assert torch.equal(after[0][[3, 0]], rows)
    assert all(not part[[3, 0]].any() for part in after[1:])
    assert all(torch.equal(new[[1, 2]], old[[1, 2]]) for old, new in zip(before, after, strict=True))


def test_a_cleared_slot_behind_a_closed_gate_stays_still_under_momentum_and_decay() -> None:
    one, layer, optimizer = _trained()
    gates = RankGates(one.model, one.layers, {name: torch.ones(4) for name in one.layers})
    closed = torch.tensor([1.0, 0.0, 1.0, 1.0])
    gates.write(layer.name, closed)
    clear_slots(optimizer, layer, [1])
    train(one, None, optimizer, range(3))
    assert not any(part[1].any() for part in _slots(layer, optimizer))
    assert all(part[0].any() for part in _slots(layer, optimizer))


def test_without_clearing_a_closed_slot_drifts() -> None:
    one, layer, optimizer = _trained()
    gates = RankGates(one.model, one.layers, {name: torch.ones(4) for name in one.layers})
    gates.write(layer.name, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    before = layer.lora_A.detach()[1].clone()
    train(one, None, optimizer, range(3))
    assert not torch.equal(layer.lora_A.detach()[1], before)


def test_without_an_optimizer_or_before_its_first_step_the_factors_alone_are_edited() -> None:
    one = adapted(rank=4, spread=0.1)
    clear_slots(None, one.first, [0])
    clear_slots(one.adamw(), one.first, [1])
    assert not one.first.lora_A[:2].any()
    assert not one.first.lora_B[:, :2].any()
    assert one.first.lora_A[2:].all()


def test_slots_that_do_not_exist_and_lists_that_do_not_match_are_refused() -> None:
    layer = adapted(rank=4).first
    with pytest.raises(ModelError, match="slots 0 to 3, not 4"):
        clear_slots(None, layer, [4])
    with pytest.raises(ModelError, match="one to one"):
        copy_slots(None, layer, [0, 1], [2, 2])
    with pytest.raises(ModelError, match="for 2 slots of 32 inputs"):
        fill_slots(None, layer, [0, 1], torch.zeros(1, 32))
