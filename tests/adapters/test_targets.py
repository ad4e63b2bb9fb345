import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from rankwise.adapters.targets import match_pattern, resolve_targets
from rankwise.errors import ModelError, TargetError
from tests.support.models import tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_t5


def adapted_by_peft(model: nn.Module, **settings: object) -> list[str]:
    """The reference: what PEFT itself puts an adapter on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = get_peft_model(model, LoraConfig(r=1, **settings))
    return [name for name, module in built.get_base_model().named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert_classifier, tiny_gpt2, tiny_t5])
@pytest.mark.parametrize("target_modules", ["all-linear", None])
def test_layers_are_those_that_peft_adapts(build, target_modules):
    task = "SEQ_CLS" if build is tiny_bert_classifier else None
    expected = adapted_by_peft(build(), target_modules=target_modules, task_type=task)
    assert list(resolve_targets(build(), target_modules).names) == expected


@pytest.mark.parametrize(
    ("build", "pattern", "exclude"),
    [
        (tiny_llama, r".*layers\.1\.self_attn\.(q|v)_proj", None),
        (tiny_llama, ["layers.0.mlp.up_proj", "o_proj"], None),
        (tiny_llama, ["q_proj", "k_proj"], ["layers.0.self_attn.q_proj"]),
        (tiny_llama, "all-linear", r".*mlp.*"),
        (tiny_bert_classifier, ["dense"], ["pooler.dense"]),
        (tiny_gpt2, ["c_proj"], r".*\.mlp\..*"),
        (tiny_t5, ["q", "wo"], None),
    ],
)
def test_patterns_mean_what_they_mean_to_peft(build, pattern, exclude):
    expected = adapted_by_peft(build(), target_modules=pattern, exclude_modules=exclude)
    assert list(resolve_targets(build(), pattern, exclude_modules=exclude).names) == expected


LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENDINGS = [*LEAVES, "layers.0.self_attn.q_proj", "1.mlp.up_proj", "model.layers.1.self_attn.o_proj", "lm_head"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["layers.0.self_attn.q_proj", "v_proj", "mlp"]), max_size=2, unique=True),
)
def test_any_list_selects_what_peft_selects(entries, exclude):
    try:
        names = list(resolve_targets(tiny_llama(), entries, exclude_modules=exclude or None).names)
    except TargetError:
        # Everything was excluded: PEFT refuses too.
        with pytest.raises(ValueError, match="modules"):
            adapted_by_peft(tiny_llama(), target_modules=entries, exclude_modules=exclude or None)
        return
    assert names == adapted_by_peft(tiny_llama(), target_modules=entries, exclude_modules=exclude or None)


@given(st.text("ab.", min_size=1, max_size=6), st.text("ab.", min_size=1, max_size=8))
def test_list_entries_match_whole_parts_at_the_end(entry, name):
    parts, wanted = name.split("."), entry.split(".")
    assert match_pattern([entry], name) == (parts[-len(wanted) :] == wanted)


def test_order_is_that_of_the_model_and_not_of_the_list():
    names = resolve_targets(tiny_llama(), ["v_proj", "q_proj"]).names
    assert [name.split(".")[-1] for name in names] == ["q_proj", "v_proj", "q_proj", "v_proj"]


def test_shapes_are_out_by_in_for_conv1d():
    shapes = {
        s.name.split(".")[-1]: (s.out_features, s.in_features)
        for s in resolve_targets(tiny_gpt2(), ["c_attn", "c_fc"]).shapes
    }
    assert shapes == {"c_attn": (96, 32), "c_fc": (48, 32)}


def test_a_misspelt_entry_alone_is_an_error_with_the_nearest_name():
    with pytest.raises(TargetError, match=r"'q_porj' matches no module; nearest: q_proj"):
        resolve_targets(tiny_llama(), ["q_porj"])


def test_the_error_lists_the_linear_layers_of_the_model():
    with pytest.raises(TargetError, match=re.escape("query (2), key (2), value (2), dense (7), classifier (1)")):
        resolve_targets(tiny_bert_classifier(), ["xyzzy"])


def test_an_entry_that_matches_nothing_beside_others_is_a_note():
    targets = resolve_targets(tiny_llama(), ["q_proj", "fc1"])
    assert len(targets.layers) == 2
    assert len(targets.notes) == 1
    assert "'fc1' matches no module" in targets.notes[0]


def test_a_name_given_as_a_string_is_explained():
    with pytest.raises(
        TargetError, match=r"a string is a regular expression .* write a list to name endings: \['q_proj'\]"
    ):
        resolve_targets(tiny_llama(), "q_proj")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(unclosed", "is not a regular expression"),
        ([], "is an empty list"),
        ([3], "holds 3"),
        ([""], "holds ''"),
        (["embed_tokens"], "an embedding"),
        (
            ["self_attn"],
            "a LlamaAttention, not a linear layer; name the layers inside it: q_proj, k_proj, v_proj, o_proj",
        ),
        (["norm"], "a LlamaRMSNorm; supported are nn.Linear"),
        (".*", "cannot be adapted"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_a_reason(pattern, message):
    with pytest.raises(TargetError, match=message):
        resolve_targets(tiny_llama(), pattern)


def test_every_fault_is_reported_at_once():
    with pytest.raises(TargetError) as caught:
        resolve_targets(tiny_llama(), ["embed_tokens", "norm", "q_proj"])
    assert len(caught.value.faults) == 2


def test_an_architecture_without_default_needs_target_modules():
    with pytest.raises(TargetError, match="PEFT has no default for this architecture"):
        resolve_targets(nn.Sequential(nn.Linear(3, 3)), None)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(TargetError, match="The model has no linear layers"):
        resolve_targets(nn.Sequential(nn.ReLU()), "all-linear")


def test_all_linear_covers_every_linear_layer_of_a_plain_torch_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert resolve_targets(model, "all-linear").names == ("0", "2")


def test_task_heads_are_never_targets():
    assert "classifier" not in resolve_targets(tiny_bert_classifier(), "all-linear").names
    with pytest.raises(TargetError, match="classifier belongs to the task head"):
        resolve_targets(tiny_bert_classifier(), ["classifier"])
    targets = resolve_targets(tiny_bert_classifier(), ["classifier", "query"])
    assert len(targets.layers) == 2
    assert "task head" in targets.notes[0]


def test_nothing_inside_a_saved_module_is_a_target():
    names = resolve_targets(tiny_bert_classifier(), "all-linear", modules_to_save=["pooler", "classifier"]).names
    assert len(names) == 12
    assert not [name for name in names if "pooler" in name]


@pytest.mark.parametrize("key", ["exclude_modules", "modules_to_save"])
def test_exclusions_and_saved_modules_that_match_nothing_are_errors(key):
    with pytest.raises(TargetError, match=rf"{key}: 'classifer' matches no module; nearest: classifier"):
        resolve_targets(tiny_bert_classifier(), "all-linear", **{key: ["classifer"]})
    notes = resolve_targets(tiny_bert_classifier(), "all-linear", **{key: ["classifier", "score"]}).notes
    assert [note for note in notes if f"{key}: 'score' matches no module" in note]


def test_modules_to_save_must_be_a_list():
    with pytest.raises(TargetError, match="it must be a list of names"):
        resolve_targets(tiny_bert_classifier(), "all-linear", modules_to_save="classifier")


def test_a_tied_output_head_is_refused_and_an_untied_one_is_not():
    with pytest.raises(TargetError, match=r"lm_head cannot be adapted: it shares its weight with model\.embed_tokens"):
        resolve_targets(tiny_llama(tied=True), ["lm_head"])
    assert resolve_targets(tiny_llama(), ["lm_head"]).names == ("lm_head",)


def test_one_module_under_two_names_is_refused():
    model = nn.ModuleDict({"first": nn.Linear(3, 3)})
    model["second"] = model["first"]
    model["third"] = nn.Linear(3, 3)
    with pytest.raises(TargetError, match="first cannot be adapted: it shares its weight with second"):
        resolve_targets(model, "all-linear")
    assert resolve_targets(model, "all-linear", exclude_modules=["first"]).names == ("third",)


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(TargetError, match="meta device"):
        resolve_targets(model, "all-linear")


def test_integer_weights_are_refused_by_name_and_passed_over_by_all_linear():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"1 cannot be adapted: weights of type torch\.int8"):
        resolve_targets(model, ["1"])
    targets = resolve_targets(model, "all-linear")
    assert targets.names == ("0",)
    assert "torch.int8" in targets.notes[0]


def test_torch_attention_projections_are_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 4)})
    targets = resolve_targets(model, "all-linear")
    assert targets.names == ("out",)
    assert "fused nn.MultiheadAttention" in targets.notes[0]


def test_convolutions_are_refused():
    with pytest.raises(TargetError, match="a convolution"):
        resolve_targets(nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)}), ["conv"])


def tiny_mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return MixtralForCausalLM(config)


def test_stacked_experts_are_refused_by_name_and_noted_under_all_linear():
    targets = resolve_targets(tiny_mixtral(), "all-linear")
    assert {name.split(".")[-1] for name in targets.names} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any("stacked expert weights stay frozen" in note for note in targets.notes)
    with pytest.raises(TargetError, match="stacked expert weights"):
        resolve_targets(tiny_mixtral(), ["gate_up_proj"])
    with pytest.raises(TargetError, match="stacked expert weights"):
        resolve_targets(tiny_mixtral(), ["experts"])


def test_a_model_with_adapters_is_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(r=1, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"already carries PEFT adapters .*load a fresh base model"):
        resolve_targets(model, "all-linear")


def test_resolving_leaves_the_model_as_it_was():
    model = tiny_llama()
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    resolve_targets(model, "all-linear")
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
