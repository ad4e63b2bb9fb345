import math

import pytest
import torch
from torch import nn

from rankwise.adapters import fingerprint
from rankwise.adapters.attach import adapted_layers, attach_lora, write_factors
from rankwise.adapters.fingerprint import (
    architecture_fingerprint,
    base_tensors,
    check_finite_weights,
    weights_fingerprint,
)
from rankwise.adapters.targets import resolve_targets
from rankwise.errors import ModelError
from rankwise.ranks.plan import RankPlan
from tests.adapters.test_layers import Linear8bitLt
from tests.support.models import tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_t5


def attached(model, **settings):
    shapes = resolve_targets(model, "all-linear", modules_to_save=settings.get("modules_to_save")).shapes
    return attach_lora(model, RankPlan.from_shapes(shapes, [1] * len(shapes), r=1, lora_alpha=1.0), **settings)


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert_classifier, tiny_gpt2, tiny_t5])
def test_both_are_equal_before_and_after_attach_and_training(build):
    model = build()
    before = architecture_fingerprint(model), weights_fingerprint(model)
    saved = ["pooler", "classifier"] if build is tiny_bert_classifier else None
    peft_model = attached(model, modules_to_save=saved, task_type="SEQ_CLS" if saved else None)
    for layer in adapted_layers(peft_model).values():
        write_factors(layer, layer.lora_A, torch.ones_like(layer.lora_B))
    assert (architecture_fingerprint(peft_model), weights_fingerprint(peft_model)) == before


def test_both_are_equal_for_equal_models_and_have_their_lengths():
    assert architecture_fingerprint(tiny_llama()) == architecture_fingerprint(tiny_llama())
    assert weights_fingerprint(tiny_llama()) == weights_fingerprint(tiny_llama())
    assert len(architecture_fingerprint(tiny_llama())) == 16
    assert len(weights_fingerprint(tiny_llama())) == 64


def test_architectures_that_compute_something_else_differ():
    models = [tiny_llama(), tiny_llama(hidden=64), tiny_llama(layers=3), tiny_llama(tied=True), tiny_gpt2(), tiny_t5()]
    eps, heads = tiny_llama(), tiny_llama()
    eps.config.rms_norm_eps = 1e-3
    heads.config.num_attention_heads = 2
    prints = [architecture_fingerprint(model) for model in [*models, eps, heads]]
    assert len(set(prints)) == len(prints)


def test_what_trainers_edit_does_not_change_the_architecture():
    model = tiny_llama()
    before = architecture_fingerprint(model)
    model.config.use_cache = False
    model.config.pad_token_id = 7
    model.config._name_or_path = "elsewhere"
    model.config.attention_dropout = 0.1
    model.train()
    model.requires_grad_(False)
    assert architecture_fingerprint(model.to(torch.bfloat16)) == before


def test_one_changed_bit_of_any_tensor_changes_the_weights_fingerprint():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = weights_fingerprint(model)
    for _, tensor in base_tensors(model):
        old = tensor.clone()
        tensor.view(-1).view(torch.uint8)[0] ^= 1
        assert weights_fingerprint(model) != before
        tensor.copy_(old)
        assert weights_fingerprint(model) == before


def test_names_types_and_shapes_enter_the_weights_fingerprint():
    base = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False)})
    renamed = nn.ModuleDict({"b": base["a"]})
    reshaped = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False)})
    reshaped["a"].weight = nn.Parameter(base["a"].weight.detach().reshape(2, 3))
    retyped = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False)})
    retyped["a"].weight = nn.Parameter(base["a"].weight.detach().view(torch.int32), requires_grad=False)
    assert len({weights_fingerprint(model) for model in (base, renamed, reshaped, retyped)}) == 4


def test_the_weights_fingerprint_does_not_depend_on_chunks_or_strides(monkeypatch):
    model = tiny_llama()
    before = weights_fingerprint(model)
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 100)
    assert weights_fingerprint(model) == before
    strided = nn.Linear(4, 4, bias=False)
    plain = nn.Linear(4, 4, bias=False)
    strided.weight = nn.Parameter(plain.weight.detach().T.contiguous().T)
    assert not strided.weight.is_contiguous()
    assert weights_fingerprint(strided) == weights_fingerprint(plain)


def test_tied_views_of_one_memory_are_told_apart_by_shape_and_stride():
    def holding(**views):
        model = nn.Module()
        for name, view in views.items():
            setattr(model, name, nn.Parameter(view))
        return model

    shared = torch.arange(4.0).view(2, 2)
    views = [shared, shared.T, shared[:1], shared.view(4)]
    assert len({weights_fingerprint(holding(a=shared, b=view)) for view in views}) == 4
    # What a view does not show does not count, and what it shows does.
    whole = [
        weights_fingerprint(holding(a=base[:1], b=base)) for base in (shared, shared + torch.tensor([[0.0], [1.0]]))
    ]
    assert whole[0] != whole[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_type_can_be_hashed(dtype):
    model = tiny_llama(dtype=dtype)
    assert weights_fingerprint(model) == weights_fingerprint(model) != weights_fingerprint(tiny_llama())


def test_packed_weights_count_with_their_logical_size():
    dense = nn.ModuleDict({"q": nn.Linear(2, 2, bias=False)})
    packed = nn.ModuleDict({"q": Linear8bitLt(torch.eye(2))})
    assert architecture_fingerprint(dense) == architecture_fingerprint(packed)


def test_weights_that_are_not_in_memory_are_an_error():
    with pytest.raises(ModelError, match="weight is not in memory"):
        weights_fingerprint(nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite_names_its_layer(value, dtype):
    model = tiny_llama(dtype=dtype)
    layers = resolve_targets(model, "all-linear").layers
    check_finite_weights(layers)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(
        ModelError, match=r"weights in model\.layers\.1\.mlp\.up_proj \(1 of 1536 values\): the checkpoint"
    ):
        check_finite_weights(layers)


def test_many_broken_layers_are_counted():
    model = tiny_llama()
    layers = resolve_targets(model, "all-linear").layers
    with torch.no_grad():
        for layer in layers:
            layer.module.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="and 9 more: "):
        check_finite_weights(layers)


def test_large_finite_weights_pass():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.fill_(3e38)
    check_finite_weights(resolve_targets(nn.Sequential(layer), "all-linear").layers)


class StateOnRequest(nn.Module):
    """Builds its state dict anew at each call, as bitsandbytes' 4-bit layers do with their quantization state."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for i, value in enumerate(self.values):
            destination[f"{prefix}state{i}"] = torch.full((1 << 18,), value)


def test_tensors_that_are_built_on_request_are_told_apart():
    # A freed tensor's memory is used again: in one pass, equal addresses are not yet equal tensors.
    first = nn.Sequential(*[StateOnRequest([float(i)]) for i in range(8)])
    other = nn.Sequential(*[StateOnRequest([float(i % 7)]) for i in range(8)])
    assert weights_fingerprint(first) == weights_fingerprint(first)
    assert weights_fingerprint(first) != weights_fingerprint(other)
