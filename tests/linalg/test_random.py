"""Draws depend on what they are for, never on the order in which they are made."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankwise.linalg.random import derived_seed, generator, kaiming_uniform


def test_a_derived_seed_is_the_same_on_every_machine() -> None:

    assert derived_seed(0, "lora_A", "layers.0") == derived_seed(0, "lora_A", "layers.0")
    assert 0 <= derived_seed(-5, "x") < 2**63
    distinct = {
        derived_seed(0, "a", "b", "c"),
        derived_seed(0, "a", "bc"),
        derived_seed(0, "ab", "c"),
        derived_seed(1, "a", "b", "c"),
    }
    assert len(distinct) == 4


def test_a_generator_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    first = torch.rand(3, generator=generator(1, "x", "y"))
    assert torch.equal(first, torch.rand(3, generator=generator(1, "x", "y")))
    assert torch.equal(before, torch.get_rng_state())


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_fewer_rows_of_a_kaiming_draw_are_the_first_of_more(columns: int, few: int, more: int, seed: int) -> None:
    few, more = sorted((few, more))
    short = kaiming_uniform(few, columns, torch.Generator().manual_seed(seed))
    long = kaiming_uniform(more, columns, torch.Generator().manual_seed(seed))
    assert torch.equal(short, long[:few])


def test_a_kaiming_draw_has_the_bound_and_variance_of_pefts_start() -> None:
    factor = kaiming_uniform(64, 400, generator(0, "lora_A", "layer"))
    bound = 1 / math.sqrt(400)
    assert factor.shape == (64, 400)
    assert factor.dtype == torch.float32
    assert 0.999 * bound < factor.abs().max() <= bound
    assert factor.var().item() == pytest.approx(bound**2 / 3, rel=0.02)
    # torch's own initialization, which PEFT calls, has this bound.
    reference = nn.init.kaiming_uniform_(torch.empty(64, 400), a=math.sqrt(5))
    assert reference.abs().max() == pytest.approx(bound, rel=1e-3)
