import hashlib
import math
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from rankwise.adapters.attach import (
    adapted_layers,
    adapter_disabled,
    attach_lora,
    modules_saved,
    write_factors,
)
from rankwise.adapters.targets import resolve_targets
from rankwise.errors import ConfigError, ModelError, PlanError
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.shapes import ScalingRule
from tests.support.models import (
    causal_batch,
    classification_batch,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)

MODELS = [tiny_llama, tiny_bert_classifier, tiny_gpt2, tiny_t5]


def plan_for(model, ranks=None, *, r=3, alpha=16.0, rule=ScalingRule.ALPHA_OVER_RANK, seed=0, targets="all-linear"):
    """A plan with ranks 0 to 4 in turn, or the given ones."""
    shapes = resolve_targets(model, targets).shapes
    chosen = [i % 5 for i in range(len(shapes))] if ranks is None else ranks
    return RankPlan.from_shapes(shapes, chosen, r=r, lora_alpha=alpha, scaling_rule=rule, budget=10**6, seed=seed)


def weight_hashes(model: nn.Module) -> dict[str, str]:
    return {n: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for n, p in model.named_parameters()}


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("rule", list(ScalingRule))
def test_every_rank_and_scaling_comes_out_as_planned(build, rule):
    model = build()
    plan = plan_for(model, rule=rule)
    adapted = adapted_layers(attach_lora(model, plan))
    assert list(adapted) == [name for name, rank in plan.ranks.items() if rank]
    for name, layer in adapted.items():
        shape = layer.base.shape
        assert layer.rank == plan.ranks[name]
        assert layer.scaling == pytest.approx(plan.scaling(name), rel=1e-15)
        assert layer.lora_A.shape == (layer.rank, shape.in_features)
        assert layer.lora_B.shape == (shape.out_features, layer.rank)
        assert not layer.lora_B.any()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=14, max_size=14).filter(any),
    st.integers(1, 9),
    st.floats(0.1, 100),
    st.sampled_from(list(ScalingRule)),
)
def test_any_plan_is_built_as_planned(ranks, r, alpha, rule):
    model = tiny_llama()
    plan = plan_for(model, ranks, r=r, alpha=alpha, rule=rule)
    adapted = adapted_layers(attach_lora(model, plan))
    assert {name: layer.rank for name, layer in adapted.items()} == {n: k for n, k in plan.ranks.items() if k}
    assert all(math.isclose(layer.scaling, plan.scaling(name), rel_tol=1e-12) for name, layer in adapted.items())


def test_more_than_ten_layers_do_not_share_patterns():
    # The name of layer 1 is the beginning of the name of layer 11, and PEFT shortens lists of 20 names and more.
    model = tiny_llama(layers=12)
    plan = plan_for(model, [1 + i % 7 for i in range(12 * 7)])
    adapted = adapted_layers(attach_lora(model, plan))
    assert {name: layer.rank for name, layer in adapted.items()} == plan.ranks


def test_a_full_name_that_ends_another_name_selects_one_module():
    inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "inner": inner})
    shapes = resolve_targets(model, "all-linear").shapes
    plan = RankPlan.from_shapes(shapes, [2, 0], r=1, lora_alpha=1.0, budget=1000)
    assert list(adapted_layers(attach_lora(model, plan))) == ["proj"]


@pytest.mark.parametrize("build", MODELS)
def test_base_weights_stay_bit_identical(build):
    model = build()
    before = weight_hashes(model)
    attached = attach_lora(
        model, plan_for(model), modules_to_save=["classifier"] if build is tiny_bert_classifier else None
    )
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in weight_hashes(attached).items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    assert after == before


def test_an_untrained_adapter_computes_the_base_model_bit_for_bit():
    batch = causal_batch()
    with torch.no_grad():
        expected = tiny_llama()(**batch).logits
        model = tiny_llama()
        assert torch.equal(attach_lora(model, plan_for(model))(**batch).logits, expected)


def test_global_random_states_do_not_move():
    model = tiny_llama()
    plan = plan_for(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    attach_lora(model, plan, modules_to_save=["lm_head"])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_lora_A_depends_on_seed_and_name_alone():
    first, second, other = tiny_llama(), tiny_llama(seed=5), tiny_llama()
    one = adapted_layers(attach_lora(first, plan_for(first)))
    torch.manual_seed(123)
    # Another model, another order of random draws, other ranks elsewhere: the same rows.
    ranks = list(plan_for(second).ranks.values())
    two = adapted_layers(attach_lora(second, plan_for(second, [k or 1 for k in ranks])))
    three = adapted_layers(attach_lora(other, plan_for(other, seed=1)))
    assert all(torch.equal(one[name].lora_A, two[name].lora_A) for name in one)
    assert not any(torch.equal(one[name].lora_A, three[name].lora_A) for name in one)


def test_only_factors_and_saved_modules_are_trainable():
    model = tiny_bert_classifier()
    attached = attach_lora(model, plan_for(model), task_type="SEQ_CLS")
    trainable = {name for name, p in attached.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trainable)
    assert {"classifier.weight", "classifier.bias"} == set(modules_saved(attached))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_float32_on_a_16_bit_base(dtype):
    model = tiny_llama(dtype=dtype)
    adapted = adapted_layers(attach_lora(model, plan_for(model)))
    assert {p.dtype for layer in adapted.values() for p in (layer.lora_A, layer.lora_B)} == {torch.float32}
    assert {layer.base.module.weight.dtype for layer in adapted.values()} == {dtype}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_mode(training):
    model = tiny_llama().train(training)
    attached = attach_lora(model, plan_for(model), lora_dropout=0.5)
    assert {module.training for module in attached.modules()} == {training}


def test_dropout_acts_on_the_adapter_only_in_training():
    model = tiny_llama()
    attached = attach_lora(model, plan_for(model), lora_dropout=0.5)
    layers = adapted_layers(attached)
    for layer in layers.values():
        write_factors(layer, layer.lora_A, torch.ones_like(layer.lora_B))
    with torch.no_grad():
        calm = [attached(**causal_batch()).logits for _ in range(2)]
        attached.train()
        wild = [attached(**causal_batch()).logits for _ in range(2)]
    assert torch.equal(*calm)
    assert not torch.equal(*wild)


def test_attaching_raises_no_warning_even_without_filters():
    for build in (tiny_llama, tiny_gpt2):
        model = build()
        plan = plan_for(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach_lora(model, plan)


def test_conv1d_and_linear_layers_can_be_mixed():
    model = nn.ModuleDict({"conv": tiny_gpt2().transformer.h[0].mlp.c_fc, "linear": nn.Linear(4, 6)})
    shapes = resolve_targets(model, "all-linear").shapes
    attached = attach_lora(model, RankPlan.from_shapes(shapes, [2, 3], r=2, lora_alpha=4.0, budget=1000))
    layers = adapted_layers(attached)
    assert layers["conv"].base.kind == "conv1d"
    for layer in layers.values():
        write_factors(layer, layer.lora_A, torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(0)))
    for layer in layers.values():
        inputs = torch.randn(3, layer.base.shape.in_features, generator=torch.Generator().manual_seed(1))
        update = layer.scaling * layer.lora_B @ layer.lora_A
        expected = inputs @ (layer.base.weight() + update).T + layer.base.module.bias
        torch.testing.assert_close(layer.module(inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", MODELS)
def test_the_update_is_scaling_times_B_times_A_in_every_layer(build):
    model = build()
    attached = attach_lora(model, plan_for(model, rule=ScalingRule.ALPHA_OVER_SQRT_RANK))
    for layer in adapted_layers(attached).values():
        write_factors(layer, layer.lora_A, torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(2)))
        delta = layer.module.get_delta_weight("default")
        expected = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        torch.testing.assert_close(
            (delta.T if layer.base.kind == "conv1d" else delta).double(), expected, rtol=0, atol=1e-5
        )


def test_gradients_reach_every_factor():
    model = tiny_bert_classifier()
    attached = attach_lora(model, plan_for(model), task_type="SEQ_CLS").train()
    for layer in adapted_layers(attached).values():
        write_factors(layer, layer.lora_A, torch.ones_like(layer.lora_B))
    attached(**classification_batch()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in attached.parameters() if p.requires_grad)


def test_a_second_adapter_is_refused():
    model = tiny_llama()
    plan = plan_for(model)
    attached = attach_lora(model, plan)
    for wrapped in (attached, attached.get_base_model()):
        with pytest.raises(ModelError, match=r"already carries PEFT adapters.*load a fresh base model"):
            attach_lora(wrapped, plan, adapter_name="second")


def test_a_plan_without_a_live_rank_is_refused():
    model = tiny_llama()
    with pytest.raises(PlanError, match="all 14 layers of the plan have rank 0"):
        attach_lora(model, plan_for(model, [0] * 14))


def test_a_plan_for_another_model_is_refused_and_the_model_stays_bare():
    plan = plan_for(tiny_llama(hidden=64))
    model = tiny_llama()
    with pytest.raises(PlanError, match="the plan is for another model"):
        attach_lora(model, plan)
    with pytest.raises(PlanError, match="none of its 14 layers"):
        attach_lora(tiny_bert_classifier(), plan)
    assert resolve_targets(model, "all-linear").layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0: it must be at least 0 and below 1"),
        ({"lora_dropout": math.nan}, "lora_dropout is nan"),
        ({"task_type": "CHAT"}, "task_type is 'CHAT'.*CAUSAL_LM"),
        ({"adapter_name": "lora"}, "adapter_name is 'lora'"),
        ({"adapter_name": "a.b"}, "adapter_name is 'a.b'"),
        ({"modules_to_save": ["lm_haed"]}, "'lm_haed' matches no module; nearest: lm_head"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=message):
        attach_lora(model, plan_for(model), **settings)


def test_a_layer_cannot_be_adapted_and_trained_in_full():
    model = tiny_bert_classifier()
    with pytest.raises(PlanError, match=r"bert\.pooler\.dense has a rank in the plan and is trained in full"):
        attach_lora(model, plan_for(model, [1] * 13), modules_to_save=["pooler"])


def test_write_factors_refuses_shapes_and_values_that_do_not_fit():
    model = tiny_llama()
    layer = next(iter(adapted_layers(attach_lora(model, plan_for(model))).values()))
    before = layer.lora_A.detach().clone()
    with pytest.raises(ModelError, match=r"k_proj: lora_A has shape \(2, 2\), the adapter holds \(1, 32\)"):
        write_factors(layer, torch.zeros(2, 2), torch.zeros(16, 1))
    broken = torch.zeros(16, 1)
    broken[3] = math.nan
    with pytest.raises(ModelError, match="k_proj: 1 of 16 values for lora_B are NaN or infinite"):
        write_factors(layer, torch.zeros(1, 32), broken)
    assert torch.equal(layer.lora_A, before)
    with pytest.raises(ModelError, match=r"infinite in torch\.float32"):
        write_factors(layer, torch.full((1, 32), 1e300, dtype=torch.float64), torch.zeros(16, 1))


def test_write_factors_keeps_the_parameters_and_their_flags():
    model = tiny_llama()
    layer = next(iter(adapted_layers(attach_lora(model, plan_for(model))).values()))
    parameter = layer.lora_A
    write_factors(layer, torch.full((1, 32), 0.5, dtype=torch.float64), torch.ones(16, 1))
    assert layer.lora_A is parameter
    assert parameter.requires_grad
    assert parameter.dtype == torch.float32
    assert (parameter == 0.5).all()


def test_a_disabled_adapter_computes_the_base_and_keeps_frozen_factors_frozen():
    model = tiny_bert_classifier()
    expected = model(**classification_batch()).logits
    attached = attach_lora(model, plan_for(model), task_type="SEQ_CLS")
    layers = adapted_layers(attached)
    for layer in layers.values():
        write_factors(layer, layer.lora_A, torch.ones_like(layer.lora_B))
    next(iter(layers.values())).lora_A.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in attached.named_parameters()}
    changed = attached(**classification_batch()).logits
    with adapter_disabled(attached), adapter_disabled(attached):
        assert torch.equal(attached(**classification_batch()).logits, expected)
    with pytest.raises(RuntimeError, match="inside"), adapter_disabled(attached):
        raise RuntimeError("inside")
    assert torch.equal(attached(**classification_batch()).logits, changed)
    assert {name: p.requires_grad for name, p in attached.named_parameters()} == flags


def test_saved_modules_are_live_views_under_their_base_names():
    model = tiny_bert_classifier()
    attached = attach_lora(model, plan_for(model, [1] * 12 + [0]), modules_to_save=["classifier", "pooler"])
    saved = modules_saved(attached)
    assert set(saved) == {
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    with torch.no_grad():
        attached.get_base_model().classifier.modules_to_save["default"].weight.fill_(3)
    assert (saved["classifier.weight"] == 3).all()
    assert modules_saved(attach_lora(tiny_llama(), plan_for(tiny_llama()))) == {}


def test_a_bare_model_and_a_missing_adapter_are_named():
    with pytest.raises(ModelError, match="the model is a LlamaForCausalLM, not a PEFT model"):
        adapted_layers(tiny_llama())
    model = tiny_llama()
    with pytest.raises(ModelError, match="no adapter 'other'; it has: default"):
        adapted_layers(attach_lora(model, plan_for(model)), "other")


def test_the_result_is_a_stock_peft_model_with_a_stock_config():
    model = tiny_llama()
    attached = attach_lora(model, plan_for(model), task_type="CAUSAL_LM")
    config = attached.peft_config["default"]
    assert isinstance(attached, PeftModel)
    assert config.init_lora_weights is True
    assert config.bias == "none"
    assert config.lora_alpha == 16
    assert isinstance(config.lora_alpha, int)
    assert not config.use_dora
