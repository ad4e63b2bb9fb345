"""Merged weights are W + scaling * lora_B @ lora_A under the base model's own names, or a refusal with its reason."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from rankwise.adapters.attach import adapted_layers
from rankwise.adapters.checkpoint import save_native
from rankwise.errors import ConfigError, ExportError, ModelError, OutputError, VerificationError
from rankwise.export.fold import fold
from rankwise.export.merge import merge_weights, save_merged, verify_merged
from rankwise.export.write import export_adapter, export_folder
from tests.export.trained import ARCHITECTURES, folded_adapter, trained


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_merged_tensors_are_the_dense_sum_and_everything_else_is_the_base(name):
    model, _ = trained(name, ranks=(2, 0, 5))
    base, folded = ARCHITECTURES[name].build(), fold(model)
    plain = base.state_dict()
    for source in (model.get_base_model(), base):
        merged = merge_weights(folded, source)
        assert merged.tensors.keys() == plain.keys()
        for key, tensor in merged.tensors.items():
            layer = folded.layers.get(key.removesuffix(".weight"))
            if layer is not None and key.endswith(".weight"):
                update = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
                expected = plain[key].double() + (update.T if name == "gpt2" else update)
                assert torch.allclose(tensor.double(), expected, rtol=0, atol=1e-6)
                assert not torch.equal(tensor, plain[key])
            else:
                assert torch.equal(tensor, folded.saved.get(key, plain[key]))
    assert all(torch.equal(tensor, plain[key]) for key, tensor in base.state_dict().items())


def test_the_base_and_its_configuration_are_only_read(tmp_path):
    model, plan = trained("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.get_base_model().config.to_dict()
    report = export_adapter(model, tmp_path / "m", layout="merged", plan=plan, dtype="bfloat16")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.get_base_model().config.to_dict() == config
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (report.dtype, report.r, report.verdicts) == ("bfloat16", None, ())


def test_logits_of_a_tied_and_of_a_16_bit_base_are_compared_with_its_own_type(tmp_path):
    model, _ = trained("gpt2", ranks=(2, 5))
    save_native(model, tmp_path / "native")
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        base = ARCHITECTURES["gpt2"].build().to(dtype)
        options = {"layout": "merged", "base": base, "batch": ARCHITECTURES["gpt2"].batch()}
        report = export_folder(tmp_path / "native", tmp_path / str(dtype), **options)
        assert 0 < report.logit_error < bound
        assert report.dtype == str(dtype).removeprefix("torch.")


def test_logits_of_merged_weights_are_compared_on_a_fresh_base(tmp_path):
    model, plan = trained("gpt2", ranks=(2, 5))
    architecture = ARCHITECTURES["gpt2"]
    options = {"layout": "merged", "plan": plan, "batch": architecture.batch()}
    assert export_adapter(model, tmp_path / "a", fresh=architecture.build(), **options).logit_error < 1e-5
    assert export_adapter(model, tmp_path / "b", **options).logit_error is None
    other = architecture.build()
    layer = next(iter(adapted_layers(model).values()))
    handle = layer.module.lora_A["default"].register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(VerificationError, match="change the logits"):
        export_adapter(model, tmp_path / "c", fresh=other, **options)
    handle.remove()
    assert not (tmp_path / "c").exists()


def test_merging_a_small_update_into_16_bits_says_what_is_lost(tmp_path):
    model, plan = trained("llama", size=1e-4)
    report = export_adapter(model, tmp_path / "m", layout="merged", plan=plan, dtype="bfloat16")
    assert any("loses up to" in note for note in report.notes)
    exact = export_adapter(model, tmp_path / "n", layout="merged", plan=plan)
    assert not any("loses up to" in note for note in exact.notes)


def test_a_checkpoint_merges_with_its_base_model_only(tmp_path):
    model, plan = trained("bert", ranks=(2, 5))
    save_native(model, tmp_path / "native")
    architecture = ARCHITECTURES["bert"]
    with pytest.raises(ExportError, match="need the base model"):
        export_folder(tmp_path / "native", tmp_path / "m", layout="merged")
    base = architecture.build()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    options = {"layout": "merged", "base": base, "batch": architecture.batch(), "plan": plan}
    report = export_folder(tmp_path / "native", tmp_path / "m", **options)
    assert 0 < report.logit_error < 1e-5
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    rounded = export_folder(tmp_path / "native", tmp_path / "h", dtype="bfloat16", **options)
    assert rounded.logit_error is None
    assert any("rounding the whole base model" in note for note in rounded.notes)
    with pytest.raises(ModelError, match="is not the base of"):
        export_folder(tmp_path / "native", tmp_path / "n", layout="merged", base=ARCHITECTURES["llama"].build())


def test_a_base_of_other_sizes_is_refused(tmp_path):
    base = nn.ModuleDict({"q": nn.Linear(5, 7)})
    with pytest.raises(ExportError, match=r"q is \[7, 5\] in the base model and \[6, 5\] in the adapter"):
        merge_weights(folded_adapter({"q": 2}, {"q": 1.0}), base)


def test_quantized_weights_are_refused_with_a_way_out():
    class Linear4bit(nn.Linear):
        pass

    packed = Linear4bit(5, 6)
    packed.weight = nn.Parameter(torch.zeros(15, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ExportError, match=r"q is a Linear4bit\. Merging into quantized weights.*: load the base"):
        merge_weights(folded_adapter({"q": 2}, {"q": 1.0}), nn.ModuleDict({"q": packed}))


def test_a_model_that_a_quantizer_owns_is_refused():
    base = nn.ModuleDict({"q": nn.Linear(5, 6)})
    base.hf_quantizer = object()
    with pytest.raises(ExportError, match="the base model is quantized"):
        merge_weights(folded_adapter({"q": 2}, {"q": 1.0}), base)


def test_saved_modules_take_the_dtype_of_the_base():
    folded = folded_adapter({"q": 2}, {"q": 1.0})
    saved = {"head.weight": torch.full((2, 5), 1 / 3)}
    base = nn.ModuleDict({"q": nn.Linear(5, 6), "head": nn.Linear(5, 2)}).to(torch.bfloat16)
    merged = merge_weights(replace(folded, saved=saved, saved_modules=("head",)), base)
    assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.bfloat16}
    assert torch.equal(merged.tensors["head.weight"], saved["head.weight"].to(torch.bfloat16))
    with pytest.raises(ExportError, match=r"tail\.weight \(modules_to_save\) is no tensor of the base model"):
        merge_weights(replace(folded, saved={"tail.weight": torch.ones(1)}), base)


def test_offloaded_and_tied_weights_are_refused():
    folded = folded_adapter({"q": 2}, {"q": 1.0})
    with pytest.raises(ExportError, match="offloaded"):
        merge_weights(folded, nn.ModuleDict({"q": nn.Linear(5, 6, device="meta")}))
    first, second = nn.Linear(5, 6), nn.Linear(5, 6)
    second.weight = first.weight
    with pytest.raises(ExportError, match=r"q\.weight shares its memory with k\.weight"):
        merge_weights(folded, nn.ModuleDict({"q": first, "k": second}))


def test_tied_embeddings_stay_tied_in_the_file(tmp_path):
    model, plan = trained("gpt2")
    merged = merge_weights(fold(model), model.get_base_model())
    tied = ("lm_head.weight", "transformer.wte.weight")
    assert merged.tensors[tied[0]].data_ptr() == merged.tensors[tied[1]].data_ptr()
    export_adapter(model, tmp_path / "m", layout="merged", plan=plan)


def test_a_plain_module_is_written_as_one_safetensors_file(tmp_path):
    folded = folded_adapter({"q": 2}, {"q": 1.0})
    base = nn.ModuleDict({"q": nn.Linear(5, 6)})
    merged = merge_weights(folded, base)
    save_merged(merged, base, tmp_path)
    assert verify_merged(tmp_path, merged, {"q"}) == 2
    changed = merge_weights(folded_adapter({"q": 2}, {"q": 1.1}), base)
    with pytest.raises(VerificationError, match=r"q\.weight differs"):
        verify_merged(tmp_path, changed, {"q"})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(VerificationError, match="is missing"):
        verify_merged(tmp_path, merged, {"q"})


def test_merged_weights_do_not_go_beside_an_adapter_or_for_a_server(tmp_path):
    model, plan = trained("llama", ranks=(2,))
    export_adapter(model, tmp_path / "a", plan=plan)
    with pytest.raises(OutputError, match="would load on top of merged weights"):
        export_adapter(model, tmp_path / "a", layout="merged", plan=plan, overwrite=True)
    with pytest.raises(ConfigError, match="writes no adapter"):
        export_adapter(model, tmp_path / "b", layout="merged", plan=plan, consumers=("vllm",))
    assert export_adapter(model, tmp_path / "b", layout="merged", plan=plan, consumers=("merged",)).layers == 14
