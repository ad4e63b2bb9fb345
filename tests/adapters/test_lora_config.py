import math
import re

import pytest
import torch
from peft import LoraConfig
from torch import nn

from rankwise.adapters.layers import view_linear
from rankwise.adapters.lora_config import check_plain_lora_config, native_config
from rankwise.errors import RecipeError
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import ScalingRule

NAMES = ("layers.1.q", "layers.11.q")


def config_for(rule, ranks=(2, 8), r=8, alpha=16.0, names=NAMES, others=()):
    layers = [view_linear(name, nn.Linear(16, 12)) for name in names]
    plan = RankPlan.from_shapes(
        [layer.shape for layer in layers], ranks, r=r, lora_alpha=alpha, scaling_rule=rule, budget=10**6
    )
    return native_config(plan, layers, [*names, *others])


def test_dynamic_rules_need_rank_patterns_only():
    # specs/gora.md 3.9, rows 1 and 2.
    for rule, stabilized in ((ScalingRule.ALPHA_OVER_SQRT_RANK, True), (ScalingRule.ALPHA_OVER_RANK, False)):
        config = config_for(rule)
        assert config.use_rslora is stabilized
        assert config.rank_pattern == {r"^layers\.1\.q": 2}
        assert config.alpha_pattern == {}
        assert (config.r, config.lora_alpha) == (8, 16)


def test_average_rules_undo_the_division_by_the_rank():
    # specs/gora.md 3.9, rows 3 and 4: alpha * sqrt(2/8) = 8 and alpha * 2/8 = 4.
    config = config_for(ScalingRule.ALPHA_OVER_SQRT_R)
    assert config.use_rslora
    assert config.alpha_pattern == {r"^layers\.1\.q": pytest.approx(8.0)}
    config = config_for(ScalingRule.ALPHA_OVER_R)
    assert not config.use_rslora
    assert config.alpha_pattern == {r"^layers\.1\.q": pytest.approx(4.0)}


def test_a_uniform_plan_needs_no_pattern():
    config = config_for(ScalingRule.ALPHA_OVER_SQRT_R, ranks=(8, 8))
    assert config.rank_pattern == config.alpha_pattern == {}


def test_patterns_match_their_own_name_only():
    config = config_for(ScalingRule.ALPHA_OVER_RANK, ranks=(2, 3))
    for key in config.rank_pattern:
        # PEFT's own rule.
        assert (
            sum(re.match(rf"(.*\.)?({key})$", name) is not None for name in (*NAMES, "x.layers.1.q", "layersX1.q")) == 1
        )


def test_a_fractional_alpha_is_kept():
    assert config_for(ScalingRule.ALPHA_OVER_RANK, alpha=12.5).lora_alpha == 12.5


def test_names_that_end_other_names_become_one_exact_expression():
    config = config_for(ScalingRule.ALPHA_OVER_RANK, names=("q", "a.b"), others=("layer.q", "aXb"))
    assert isinstance(config.target_modules, str)
    matched = [name for name in ("q", "a.b", "layer.q", "aXb") if re.fullmatch(config.target_modules, name)]
    assert matched == ["q", "a.b"]
    assert config_for(ScalingRule.ALPHA_OVER_RANK).target_modules == set(NAMES)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"q": 2}}, {"init_lora_weights": "eva"}])
def test_plain_adapters_are_accepted(settings):
    config = {**LoraConfig(r=4, target_modules=["q"]).to_dict(), **settings}
    check_plain_lora_config(config)
    check_plain_lora_config({**config, "peft_type": "LORA"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "ADALORA"),
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("use_qalora", True),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"scale": 1.0}),
        ("monteclora_config", {"num_samples": 8}),
        ("arrow_config", {"top_k": 3}),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("trainable_token_indices", [5]),
        ("layer_replication", [[0, 4], [2, 5]]),
        *[("init_lora_weights", kind) for kind in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")],
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(key, value):
    config = {**LoraConfig(r=4, target_modules=["q"]).to_dict(), key: value}
    with pytest.raises(RecipeError, match=rf"^{key} is "):
        check_plain_lora_config(config)


def test_every_refused_setting_is_listed_at_once():
    with pytest.raises(RecipeError) as caught:
        check_plain_lora_config({"peft_type": "LORA", "use_dora": True, "lora_bias": True, "bias": "lora_only"})
    assert len(caught.value.faults) == 3


def test_a_missing_type_is_refused():
    with pytest.raises(RecipeError, match="peft_type is None"):
        check_plain_lora_config({"r": 8})


def test_refused_keys_are_fields_that_peft_still_has():
    # A key that PEFT renamed would never be refused again.
    from rankwise.adapters import lora_config

    assert not lora_config._REFUSED.keys() - LoraConfig(r=1).to_dict().keys()


def test_scalings_follow_from_the_config_by_peft_s_formula():
    for rule in ScalingRule:
        config = config_for(rule, ranks=(3, 7), r=5, alpha=11.0)
        for name, rank in zip(NAMES, (3, 7), strict=True):
            key = "^" + re.escape(name)
            alpha = config.alpha_pattern.get(key, config.lora_alpha)
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            assert scaling == pytest.approx(rule.scaling(11.0, rank, 5), rel=1e-15)


def test_building_a_config_draws_no_random_number():
    state = torch.get_rng_state()
    layers = [view_linear("q", nn.Linear(4, 4))]
    state = torch.get_rng_state()
    plan = RankPlan.from_shapes([layers[0].shape], [1], r=1, lora_alpha=1.0)
    native_config(plan, layers, ["q"])
    assert torch.equal(torch.get_rng_state(), state)
