"""Folding puts gates, boosters, offsets and scalings into plain factors without changing the function."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from rankwise.adapters.attach import adapted_layers
from rankwise.adapters.checkpoint import save_native
from rankwise.adapters.state import FactorPair, FoldState
from rankwise.errors import ArtifactError, ExportError
from rankwise.export.files import AdapterFiles
from rankwise.export.fold import base_module_names, fold, fold_files, fold_folder
from rankwise.linalg.factors import relative_difference
from rankwise.ranks.shapes import LayerShape
from tests.export.trained import ARCHITECTURES, trained
from tests.support.models import tiny_bert_classifier, tiny_llama

KEY = "base_model.model.l.q.lora_{}.weight"


def _random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    rank=st.integers(1, 6),
    boosters=st.integers(0, 3),
    offset=st.integers(0, 3),
    gate=st.none() | st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0]), min_size=6, max_size=6),
    alpha=st.floats(0.5, 32),
)
@settings(max_examples=60, deadline=None)
def test_the_folded_update_is_the_dense_sum_of_its_parts(rank, boosters, offset, gate, alpha):
    A, B = _random(rank, 5, seed=0), _random(7, rank, seed=1)
    booster = FactorPair(_random(boosters, 5, seed=2), _random(7, boosters, seed=3))
    start = FactorPair(_random(offset, 5, seed=4), _random(7, offset, seed=5))
    g = torch.ones(rank) if gate is None else torch.tensor(gate[:rank])
    state = FoldState(
        gates={} if gate is None else {"l.q": g},
        boosters={"l.q": booster} if boosters else {},
        offsets={"l.q": start} if offset else {},
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    layer = fold_files(AdapterFiles(config, {KEY.format("A"): A, KEY.format("B"): B}), state).layers["l.q"]
    dense = B.double() @ torch.diag(g.double()) @ A.double()
    dense += booster.lora_B.double() @ booster.lora_A.double() - start.lora_B.double() @ start.lora_A.double()
    folded = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.allclose(folded, alpha / rank * dense, rtol=1e-6, atol=1e-5)
    assert layer.rank == int((g != 0).sum()) + boosters + offset


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_native_folder_folds_to_what_the_live_model_folds_to(name, tmp_path):
    model, _ = trained(name)
    save_native(model, tmp_path)
    live, stored = fold(model), fold_folder(tmp_path)
    assert live.layers.keys() == stored.layers.keys()
    for layer_name, layer in live.layers.items():
        other = stored.layers[layer_name]
        assert torch.equal(layer.lora_A, other.lora_A)
        assert torch.equal(layer.lora_B, other.lora_B)
        assert layer.scaling == pytest.approx(other.scaling, rel=1e-15)
        assert layer.shape == other.shape
    assert live.saved.keys() == stored.saved.keys()
    assert all(torch.equal(tensor, stored.saved[key]) for key, tensor in live.saved.items())
    assert (live.fan_in_fan_out, live.task_type) == (stored.fan_in_fan_out, stored.task_type)
    assert set(live.saved_modules) == set(stored.saved_modules)


def test_the_folded_factors_do_not_share_memory_with_the_model():
    model, _ = trained()
    folded = fold(model)
    for name, layer in adapted_layers(model).items():
        before = folded.layers[name].lora_B.clone()
        layer.lora_B.data.add_(1.0)
        assert torch.equal(folded.layers[name].lora_B, before)


def test_the_module_names_are_those_of_the_base_before_peft():
    for build, name in ((tiny_llama, "llama"), (tiny_bert_classifier, "bert")):
        model, _ = trained(name)
        plain = frozenset(name for name, _ in build().named_modules() if name)
        assert base_module_names(model.get_base_model()) == base_module_names(build()) == plain


def test_empty_layers_of_the_plan_become_layers_of_rank_zero():
    model, plan = trained(ranks=(0, 3))
    empty = [layer.shape for layer in plan.layers if layer.rank == 0]
    folded = fold(model, empty_layers=empty)
    assert folded.ranks == plan.ranks
    assert fold(model).ranks == {name: rank for name, rank in plan.ranks.items() if rank}


def test_non_finite_factors_and_modules_are_refused_by_name():
    model, _ = trained("bert")
    layer = next(iter(adapted_layers(model).values()))
    kept = layer.lora_A.data.clone()
    layer.lora_A.data[0, 0] = float("nan")
    with pytest.raises(ExportError, match=rf"{layer.name}\.lora_A holds NaN or Inf"):
        fold(model)
    layer.lora_A.data.copy_(kept)
    model.get_base_model().classifier.modules_to_save["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(ExportError, match=r"classifier\.weight \(modules_to_save\) holds NaN or Inf"):
        fold(model)


def test_sharded_parameters_that_were_not_gathered_are_refused():
    model, _ = trained()
    layer = next(iter(adapted_layers(model).values()))
    layer.lora_A.data = torch.empty(0)
    with pytest.raises(ExportError, match=r"lora_A is empty, shape \[0\]: gather sharded parameters"):
        fold(model)


def test_ranks_that_contradict_the_configuration_are_refused(tmp_path):
    model, _ = trained()
    save_native(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {}}))
    with pytest.raises(ArtifactError, match=r"rank 6 in the file, 4 by the configuration"):
        fold_folder(tmp_path)


def test_undeclared_tensors_are_refused(tmp_path):
    model, _ = trained()
    save_native(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.model.embed_tokens.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ArtifactError, match="neither a LoRA factor nor part of modules_to_save"):
        fold_folder(tmp_path)


def test_a_stock_peft_adapter_that_rankwise_never_saw_folds_as_peft_computes(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=9,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.v_proj": 5},
        init_lora_weights=False,
    )
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    folded = fold_folder(tmp_path)
    assert folded.targets == ("q_proj", "v_proj")
    for name, layer in folded.layers.items():
        dense = model.get_base_model().get_submodule(name).get_delta_weight("default")
        assert torch.allclose(layer.scaling * layer.lora_B @ layer.lora_A, dense, atol=1e-6)
    live = fold(model)
    for name, layer in folded.layers.items():
        pair, other = (layer.lora_A, layer.lora_B * layer.scaling), live.layers[name]
        assert relative_difference(pair, (other.lora_A, other.lora_B * other.scaling)) < 1e-9


def test_a_source_list_that_something_else_narrows_is_not_taken_for_exact(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0]))
    model.save_pretrained(tmp_path)
    assert fold_folder(tmp_path).targets is None


def test_a_layer_that_is_already_there_is_not_replaced_by_an_empty_one():
    model, plan = trained(ranks=(2,))
    shape = plan.layers[0].shape
    folded = fold(model, empty_layers=[shape, LayerShape("new.q", 4, 3)])
    assert folded.layers[shape.name].rank == 2
    assert folded.layers["new.q"].lora_B.shape == (4, 0)
    assert replace(folded).ranks["new.q"] == 0
