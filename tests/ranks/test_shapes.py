"""What a rank costs, and what multiplies it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.ranks.shapes import LayerShape, ScalingRule, uniform_budget


def test_a_rank_costs_its_row_and_its_column():
    shape = LayerShape("up", out_features=32, in_features=8)
    assert (shape.cost, shape.max_rank) == (40, 8)
    assert uniform_budget([shape, LayerShape("down", 8, 32)], 3) == 240


def test_the_published_budget_of_llama_3_1_8b_attention_is_reproduced():
    # GoRA, arXiv 2502.12171v3: 6,815,744 parameters at r = 8 on q, k, v and o of 32 blocks.
    block = [LayerShape("q", 4096, 4096), LayerShape("k", 1024, 4096), LayerShape("v", 1024, 4096)]
    shapes = [*block, LayerShape("o", 4096, 4096)] * 32
    assert [uniform_budget(shapes, r) for r in (8, 32, 128)] == [6_815_744, 27_262_976, 109_051_904]


@pytest.mark.parametrize(
    ("rule", "stabilized", "own"),
    [
        ("alpha/rank", False, True),
        ("alpha/sqrt(rank)", True, True),
        ("alpha/r", False, False),
        ("alpha/sqrt(r)", True, False),
    ],
)
def test_a_rule_says_what_divides_and_whether_by_its_root(rule, stabilized, own):
    found = ScalingRule(rule)
    assert (found.rank_stabilized, found.own_rank) == (stabilized, own)
    base = 9 if own else 4
    assert found.divisor(9, 4) == (math.sqrt(base) if stabilized else base)


@given(st.sampled_from(ScalingRule), st.floats(0.1, 100), st.integers(1, 256))
def test_all_rules_of_one_kind_agree_where_the_rank_is_r(rule, alpha, r):
    assert rule.scaling(alpha, r, r) == alpha / (math.sqrt(r) if rule.rank_stabilized else r)
