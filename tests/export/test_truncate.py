"""An adapter cut to a budget is the best that fits, and what is lost is what is told."""

import pytest
import torch
from torch import Tensor

from rankwise.export.fold import FoldedAdapter, FoldedLayer
from rankwise.export.truncate import truncate_adapter
from rankwise.ranks.shapes import LayerShape, uniform_budget


def layer(name: str, out: int, rank: int, inner: int, *, scaling: float = 2.0, decay: float = 0.5) -> FoldedLayer:
    source = torch.Generator().manual_seed(len(name) + 7 * rank + out)
    A = torch.randn(rank, inner, generator=source)
    B = torch.randn(out, rank, generator=source) * decay ** torch.arange(rank)
    return FoldedLayer(LayerShape(name, out, inner), A, B, scaling)


def adapter(*layers: FoldedLayer) -> FoldedAdapter:
    return FoldedAdapter(layers={one.shape.name: one for one in layers}, saved={})


def dense(one: FoldedLayer) -> Tensor:
    return one.scaling * one.lora_B.double() @ one.lora_A.double()


def spent(folded: FoldedAdapter) -> int:
    return sum(one.rank * one.shape.cost for one in folded.layers.values())


WHOLE = adapter(
    layer("q", 16, 6, 12), layer("up", 24, 5, 12, scaling=0.5), layer("v", 8, 3, 12), layer("idle", 8, 0, 9)
)


def test_an_adapter_within_its_budget_is_left_as_it_is() -> None:
    found, told = truncate_adapter(WHOLE, spent(WHOLE))
    assert found is WHOLE
    assert told is None


@pytest.mark.parametrize("r", [1, 2, 3])
def test_x7_the_error_is_the_tail_and_the_budget_holds(r: int) -> None:
    budget = uniform_budget([one.shape for one in WHOLE.layers.values()], r)
    found, told = truncate_adapter(WHOLE, budget)
    assert told is not None
    assert spent(found) <= budget
    lost = whole = 0.0
    for name, one in WHOLE.layers.items():
        kept = found.layers[name]
        tail = torch.linalg.svdvals(dense(one))[kept.rank :].square().sum().sqrt().item()
        error = (dense(kept) - dense(one)).norm().item()
        assert error == pytest.approx(tail, rel=1e-5, abs=1e-6)
        if kept.rank < one.rank:
            assert told.discarded[name] == pytest.approx(error / dense(one).norm().item(), rel=1e-5)
        else:
            assert name not in told.discarded
        lost, whole = lost + error**2, whole + dense(one).norm().item() ** 2
    assert told.total == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert told.lossy
    assert told.max_rank == max(one.rank for one in found.layers.values())
    assert found.notes[-1].startswith("warning: max_rank auto" if told.total > 0.05 else "max_rank auto")


def test_ranks_that_hold_nothing_are_lost_without_loss() -> None:
    one = layer("q", 16, 4, 12)
    twice = FoldedLayer(one.shape, torch.cat([one.lora_A, one.lora_A]), torch.cat([one.lora_B, one.lora_B], dim=1), 1.0)
    found, told = truncate_adapter(adapter(twice), 4 * 28)
    assert told is not None
    assert not told.lossy
    assert found.layers["q"].rank == 4
    torch.testing.assert_close(dense(found.layers["q"]), dense(twice), rtol=1e-5, atol=1e-6)


def test_an_update_of_zero_needs_no_parameters() -> None:
    nothing = FoldedLayer(LayerShape("q", 4, 4), torch.ones(3, 4), torch.zeros(4, 3), 1.0)
    found, told = truncate_adapter(adapter(nothing), 8)
    assert told is not None
    assert (found.layers["q"].rank, told.total, told.discarded) == (0, 0.0, {})
