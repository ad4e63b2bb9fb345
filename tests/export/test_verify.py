"""Verification finds every difference, and leaves the live model exactly as it found it."""

import json
import random
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.adapters.attach import adapted_layers
from rankwise.errors import ExportError, VerificationError
from rankwise.export.fold import fold
from rankwise.export.live import adapter_on_base, computed_logits, file_as_second_adapter
from rankwise.export.verify import logit_difference, verify
from rankwise.export.write import export_adapter
from tests.export.trained import ARCHITECTURES, trained

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def written(tmp_path):
    model, plan = trained("bert", ranks=(2, 1, 5))
    export_adapter(model, tmp_path / "a", plan=plan)
    return tmp_path / "a", model, ARCHITECTURES["bert"].batch()


def _edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def _some_factor(tensors, side="B"):
    return next(key for key in sorted(tensors) if f"lora_{side}" in key and tensors[key].any())


def _state(model):
    return (
        {name: (p.detach().clone(), p.requires_grad, id(p)) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        model.active_adapter,
        set(model.peft_config),
        [len(module._forward_hooks) for module in model.modules()],
    )


def _random_states():
    return torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()


@pytest.mark.parametrize("fails", [False, True])
def test_the_live_model_is_left_exactly_as_found(written, fails):
    folder, model, batch = written
    model.train()
    model.get_base_model().bert.encoder.layer[0].eval()
    frozen = next(iter(adapted_layers(model).values()))
    frozen.lora_A.requires_grad_(False)
    if fails:
        _edit_tensors(folder, lambda tensors: tensors[_some_factor(tensors)].mul_(1.001))
    before, states = _state(model), _random_states()
    folded = fold(model)
    if fails:
        with pytest.raises(VerificationError):
            verify(folder, folded, model, batch)
        file_as_second_adapter(model, folder, batch)
    else:
        verify(folder, folded, model, batch)
    after = _state(model)
    assert before[0].keys() == after[0].keys()
    for name, (tensor, *rest) in before[0].items():
        assert torch.equal(tensor, after[0][name][0])
        assert rest == list(after[0][name][1:]), name
    assert before[1:] == after[1:]
    torch_state, numpy_state, python_state = _random_states()
    assert torch.equal(states[0], torch_state)
    assert numpy.array_equal(states[1], numpy_state)
    assert states[2] == python_state
    assert not any("rankwise_written" in name for name in model.state_dict())


def test_a_load_that_fails_half_way_leaves_no_second_adapter(written):
    folder, model, batch = written
    before = _state(model)
    _edit_tensors(folder, lambda tensors: tensors.pop("base_model.model.classifier.weight"))
    with pytest.raises(KeyError):
        file_as_second_adapter(model, folder, batch)
    after = _state(model)
    assert before[0].keys() == after[0].keys()
    assert before[1:] == after[1:]


def test_figures_of_a_right_file_are_small_and_measured(written):
    folder, model, batch = written
    figures = verify(folder, fold(model), model, batch)
    assert figures.update_error < 1e-6
    assert 0 < figures.logit_error < 1e-5
    assert (figures.update_bound, figures.logit_bound) == (1e-5, 1e-5)
    fresh = verify(folder, fold(model), model, batch, ARCHITECTURES["bert"].build())
    assert fresh.logit_error < 1e-5
    assert verify(folder, fold(model)).logit_error is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[_some_factor(t)].mul_(1 + 1e-4), "differs from the trained one by 0.0001 of its size"),
        (lambda t: t[_some_factor(t)].fill_(float("nan")), "holds NaN or Inf"),
        (lambda t: t.pop(_some_factor(t)), "lora_B is missing"),
        (
            lambda t: t["base_model.model.classifier.bias"].add_(1e-7),
            "classifier.bias: differs from the trained module",
        ),
        (lambda t: t.pop("base_model.model.classifier.bias"), "classifier.bias: part of modules_to_save and missing"),
        (lambda t: t.update({"base_model.model.extra.weight": torch.ones(1)}), "extra.weight: not declared"),
        (lambda t: [t.pop(k) for k in sorted(t) if "layer.0.attention.self.query" in k], "query: rank 2 was trained"),
        (
            lambda t: t.update({f"base_model.model.bert.new.lora_{s}.weight": torch.ones(5, 5) for s in "AB"}),
            "bert.new: a layer that was not trained",
        ),
    ],
)
def test_every_damage_to_the_tensors_is_found(written, change, message):
    folder, model, _ = written
    _edit_tensors(folder, change)
    with pytest.raises(VerificationError, match=message):
        verify(folder, fold(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 5.5}, "lora_alpha is 5.5, allowed: an integer"),
        ({"use_rslora": True}, "use_rslora is set"),
        ({"lora_alpha": 10}, "differs from the trained one by 1 of its size"),
        ({"r": 6, "lora_alpha": 6}, "rank 5 in the tensors, 6 in the configuration"),
        ({"use_dora": True}, "cannot be read back"),
    ],
)
def test_every_damage_to_the_configuration_is_found(written, changes, message):
    folder, model, _ = written
    _edit_config(folder, **changes)
    with pytest.raises(VerificationError, match=message):
        verify(folder, fold(model))


def test_a_truncated_file_is_found(written):
    folder, model, _ = written
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(VerificationError, match="cannot be read back"):
        verify(folder, fold(model))


def test_what_plain_factors_do_not_hold_shows_in_the_logits(written):
    folder, model, batch = written
    layer = next(iter(adapted_layers(model).values()))
    handle = layer.module.lora_A["default"].register_forward_hook(lambda module, inputs, output: output * 1.5)
    try:
        with pytest.raises(VerificationError, match="change the logits by"):
            verify(folder, fold(model), model, batch)
    finally:
        handle.remove()
    assert verify(folder, fold(model), model, batch).logit_error < 1e-5


def test_hooks_on_the_trained_adapter_do_not_act_on_the_second_one(written):
    folder, model, batch = written
    right = file_as_second_adapter(model, folder, batch)
    handles = [
        layer.module.lora_A["default"].register_forward_hook(lambda module, inputs, output: output * 0)
        for layer in adapted_layers(model).values()
    ]
    assert torch.equal(file_as_second_adapter(model, folder, batch), right)
    for handle in handles:
        handle.remove()


def test_a_consumer_that_was_asked_for_and_is_not_served_fails_the_verification(written):
    folder, model, _ = written
    with pytest.raises(VerificationError, match=r"vllm >= 0.32 refuses: modules_to_save"):
        verify(folder, fold(model), consumers=("vllm",))
    verify(folder, fold(model), consumers=("peft",))


def test_a_base_of_16_bits_is_verified_within_its_own_bound(tmp_path):
    model, plan = trained("llama", ranks=(2, 5))
    model.get_base_model().to(torch.bfloat16)
    for layer in adapted_layers(model).values():
        layer.module.lora_A.float()
        layer.module.lora_B.float()
    report = export_adapter(model, tmp_path / "a", plan=plan, batch=ARCHITECTURES["llama"].batch())
    assert report.verification.update_error < 1e-6
    assert report.logit_error <= report.verification.logit_bound == 5e-2


def test_the_user_s_matmul_precision_comes_back(written):
    folder, model, batch = written
    torch.set_float32_matmul_precision("high")
    try:
        verify(folder, fold(model), model, batch)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_model_without_logits_is_refused_with_advice():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return {"something": x}

    with pytest.raises(ExportError, match="returns a dict without logits"):
        computed_logits(Odd(), {"x": torch.ones(1)})


def test_logit_differences_by_hand():
    assert logit_difference(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0])) == pytest.approx(0.2)
    assert logit_difference(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert logit_difference(torch.zeros(2), torch.zeros(3)) == float("inf")
    assert logit_difference(torch.zeros(2), torch.zeros(2)) == 0.0


def test_a_base_that_carried_a_checkpoint_for_a_moment_is_as_before(written):
    folder, _, batch = written
    base = ARCHITECTURES["bert"].build().train()
    names = [name for name, _ in base.named_modules()]
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    attributes = set(vars(base))
    with adapter_on_base(base, folder) as loaded:
        assert logit_difference(computed_logits(loaded, batch), computed_logits(base, batch)) == 0
    assert [name for name, _ in base.named_modules()] == names
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in base.state_dict().items())
    assert set(vars(base)) == attributes
    assert base.training


def test_a_folded_adapter_of_another_model_is_found(written):
    folder, model, _ = written
    folded = fold(model)
    name, layer = next(iter(folded.layers.items()))
    other = replace(folded, layers={**folded.layers, name: replace(layer, scaling=layer.scaling * 2)})
    with pytest.raises(VerificationError, match=r"by 0\.5 of its size"):
        verify(folder, other)
