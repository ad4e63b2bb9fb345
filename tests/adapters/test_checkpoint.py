import contextlib
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from rankwise.adapters.attach import adapted_layers, attach_lora, modules_saved, write_factors
from rankwise.adapters.checkpoint import (
    load_native,
    read_adapter_config,
    read_safetensors,
    save_native,
    write_safetensors,
)
from rankwise.adapters.targets import resolve_targets
from rankwise.errors import ArtifactError, ExportError
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


def trained(build, *, seed=0, step=1, rule=ScalingRule.ALPHA_OVER_SQRT_RANK, dtype=None, **settings):
    """An attached model of uneven ranks (0 to 4) with random factors, as after training."""
    model = build()
    shapes = resolve_targets(model, "all-linear").shapes
    ranks = [(i * step) % 5 for i in range(len(shapes))]
    plan = RankPlan.from_shapes(shapes, ranks, r=3, lora_alpha=16.0, scaling_rule=rule, budget=10**6)
    if build is tiny_bert_classifier:
        settings.setdefault("task_type", "SEQ_CLS")
    peft_model = attach_lora(model, plan, **settings)
    rng = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(peft_model).values():
        write_factors(
            layer, torch.randn(layer.lora_A.shape, generator=rng), torch.randn(layer.lora_B.shape, generator=rng)
        )
        if dtype:
            layer.module.lora_A.to(dtype)
            layer.module.lora_B.to(dtype)
    for tensor in modules_saved(peft_model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=rng))
    return peft_model


def all_tensors(model):
    factors = {
        f"{name}.{side}": getattr(layer, side).detach().clone()
        for name, layer in adapted_layers(model).items()
        for side in ("lora_A", "lora_B")
    }
    return factors | {name: tensor.clone() for name, tensor in modules_saved(model).items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k].view(torch.uint8), second[k].view(torch.uint8))
        for k in first
    )


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_was_saved_is_loaded_bit_for_bit(build, dtype, tmp_path):
    model = trained(build, dtype=dtype)
    save_native(model, tmp_path)
    other = trained(build, seed=9, dtype=dtype)
    assert not same_bits(all_tensors(other), all_tensors(model))
    load_native(other, tmp_path)
    assert same_bits(all_tensors(other), all_tensors(model))


@pytest.mark.parametrize("build", MODELS)
def test_stock_peft_loads_the_folder_and_computes_the_same_logits(build, tmp_path):
    model = trained(build)
    save_native(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message="fan_in_fan_out")
        fresh = PeftModel.from_pretrained(build(), tmp_path)
    batch = classification_batch() if build is tiny_bert_classifier else causal_batch()
    if build is tiny_t5:
        batch.pop("attention_mask")
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_the_folder_holds_what_peft_itself_would_save(tmp_path):
    model = trained(tiny_bert_classifier)
    save_native(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert same_bits(ours, theirs)
    config = read_adapter_config(tmp_path / "ours")
    reference = read_adapter_config(tmp_path / "theirs")
    for each in (config, reference):
        each["target_modules"] = sorted(each["target_modules"])
    assert config == reference
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_loading_leaves_parameters_and_flags_in_place(tmp_path):
    model = trained(tiny_llama)
    save_native(model, tmp_path)
    layer = next(iter(adapted_layers(model).values()))
    layer.lora_A.requires_grad_(False)
    parameter = layer.lora_A
    load_native(model, tmp_path)
    assert layer.lora_A is parameter
    assert not parameter.requires_grad


def test_saving_again_replaces_the_old_files_and_leaves_no_others(tmp_path):
    save_native(trained(tiny_llama), tmp_path)
    model = trained(tiny_llama, seed=3)
    save_native(model, tmp_path)
    other = trained(tiny_llama, seed=4)
    load_native(other, tmp_path)
    assert same_bits(all_tensors(other), all_tensors(model))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_of_other_ranks_is_refused_with_the_difference(tmp_path):
    save_native(trained(tiny_llama), tmp_path)
    model = trained(tiny_llama, step=2)
    before = all_tensors(model)
    with pytest.raises(
        ArtifactError, match=r"rank_pattern is .* does not fit|does not fit the attached adapter: rank_pattern"
    ):
        load_native(model, tmp_path)
    assert same_bits(all_tensors(model), before)


def test_a_checkpoint_of_another_scaling_rule_is_refused(tmp_path):
    save_native(trained(tiny_llama), tmp_path)
    with pytest.raises(ArtifactError, match="use_rslora is True in the file and False in the model"):
        load_native(trained(tiny_llama, rule=ScalingRule.ALPHA_OVER_RANK), tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.popitem(), "is missing from the file"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is in the file only"),
        (lambda t: t.update({next(iter(t)): torch.zeros(3, 3)}), r"is \(3, 3\) in the file and"),
        (
            lambda t: t.update({next(iter(t)): next(iter(t.values())).half()}),
            "is torch.float16 in the file and torch.float32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(edit, message, tmp_path):
    save_native(trained(tiny_llama), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    model = trained(tiny_llama, seed=2)
    before = all_tensors(model)
    with pytest.raises(ArtifactError, match=message):
        load_native(model, tmp_path)
    assert same_bits(all_tensors(model), before)


def test_empty_tensors_are_not_saved(tmp_path):
    model = trained(tiny_llama)
    layer = next(iter(adapted_layers(model).values()))
    layer.lora_A.data = torch.empty(0)
    with pytest.raises(ExportError, match=r"k_proj\.lora_A\.weight is empty in this process \(1 of 22 tensors\)"):
        save_native(model, tmp_path)
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_truncation_is_an_artifact_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "adapter_model.safetensors"
    save_file({"a": torch.arange(10.0), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(
        ArtifactError, match=r"adapter_model\.safetensors \(\d+ bytes\) is not a whole safetensors file"
    ):
        read_safetensors(path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_an_artifact_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("noise") / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="copy it again from its source"):
        read_safetensors(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_byte_raises_nothing_but_an_artifact_error(tmp_path_factory, position, value):
    path = tmp_path_factory.mktemp("flip") / "x.safetensors"
    save_file({"a": torch.arange(10.0)}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(bytes(content))
    # A flipped bit in the data, or one that leaves the header whole, cannot be seen: no other exception may come out.
    with contextlib.suppress(ArtifactError):
        assert isinstance(read_safetensors(path), dict)


def test_absent_files_and_pickles_say_what_to_do(tmp_path):
    with pytest.raises(ArtifactError, match="is missing: check the path"):
        read_safetensors(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="is a folder"):
        read_safetensors(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin beside it is a pickle.*convert it"):
        read_safetensors(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin is a pickle.*convert it"):
        read_safetensors(tmp_path / "adapter_model.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{broken", "is not JSON"), ("[1]", "holds no JSON object but a list"), (b"\xff\xfe{}", "is not JSON")],
)
def test_a_damaged_config_is_an_artifact_error(content, message, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError, match=message):
        read_adapter_config(tmp_path)


def test_a_missing_config_or_folder_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is missing"):
        read_adapter_config(tmp_path)
    with pytest.raises(ArtifactError, match="is not a folder"):
        read_adapter_config(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8}))
    assert read_adapter_config(tmp_path) == {"r": 8}


def test_tensor_files_are_as_readable_as_any_other_new_file(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    write_safetensors(tmp_path / "new.safetensors", {"a": torch.ones(2)}, {"format": "pt"})
    assert (tmp_path / "new.safetensors").stat().st_mode == plain.stat().st_mode
    assert torch.equal(read_safetensors(tmp_path / "new.safetensors")["a"], torch.ones(2))
