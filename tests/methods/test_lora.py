"""Plain LoRA: uniform ranks, Kaiming lora_A, zero lora_B, alpha / rank."""

import math

import pytest
import torch

from rankwise.errors import BudgetError
from rankwise.linalg.random import generator, kaiming_uniform
from rankwise.methods.base import Start, keep_float32
from rankwise.methods.lora import LoRA, uniform_ranks
from rankwise.ranks.shapes import LayerShape, ScalingRule
from tests.methods.support import budget_of, known, random

SHAPES = [LayerShape("big", 64, 32), LayerShape("small", 6, 32), LayerShape("thin", 32, 4)]


def test_every_layer_gets_the_rank_asked_for() -> None:
    allocation = LoRA().allocate(SHAPES, budget_of(SHAPES, 4), None)
    assert allocation.ranks == (4, 4, 4)
    assert allocation.importance is None
    assert LoRA().request(SHAPES, budget_of(SHAPES, 4), 0) is None


def test_a_rank_above_a_layers_size_is_an_error_that_lists_every_such_layer() -> None:
    with pytest.raises(BudgetError) as caught:
        uniform_ranks(SHAPES, 8)
    assert len(caught.value.faults) == 2
    assert "r: 8 is above the size of layer small (6 x 32); at most 6 is possible there" in caught.value.faults[0]
    assert "thin" in caught.value.faults[1]


def test_the_start_is_kaiming_a_and_zero_b_from_the_layers_own_stream() -> None:
    found = known("layers.0", random(48, 64), random(48, 64, seed=1))
    budget = budget_of([found.shape], 4)
    start = Start(
        layer=found.layer, rank=4, divisor=4.0, budget=budget, seed=5, dtype_cast=keep_float32, statistics=None
    )
    before = torch.get_rng_state()
    factors = LoRA().initialize(start)
    assert torch.equal(torch.get_rng_state(), before)
    assert not factors.lora_B.any()
    assert factors.lora_B.shape == (48, 4)
    assert factors.lora_A.abs().max() <= 1 / 8
    assert torch.equal(factors.lora_A, LoRA().initialize(start).lora_A)
    # attach writes the same draw before any method does
    assert torch.equal(factors.lora_A, kaiming_uniform(4, 64, generator(5, "lora_A", "layers.0")))


def test_kaiming_uniform_has_pefts_bound() -> None:
    module = torch.nn.Linear(400, 64, bias=False)
    torch.nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=torch.Generator().manual_seed(3))
    ours = kaiming_uniform(64, 400, torch.Generator().manual_seed(3))
    assert module.weight.abs().max().item() == pytest.approx(1 / 20, rel=1e-3)
    assert ours.abs().max().item() == pytest.approx(1 / 20, rel=1e-3)
    assert torch.allclose(ours, module.weight.detach(), rtol=1e-6)


def test_the_scaling_is_alpha_over_the_layers_own_rank() -> None:
    assert LoRA().scaling_rule() is ScalingRule.ALPHA_OVER_RANK
