"""Every layout is built exactly as specified and holds the same updates."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import ConfigError, ExportError
from rankwise.export.fold import FoldedLayer
from rankwise.export.layouts import build, check_layout, smallest_vllm_rank
from rankwise.export.verify import update_errors
from rankwise.ranks.shapes import LayerShape
from tests.export.trained import folded_adapter

NAMES = ("m.layers.0.q", "m.layers.1.q", "m.layers.11.q")


def _layer(name, lora_A, lora_B, scaling):
    lora_A, lora_B = torch.tensor(lora_A), torch.tensor(lora_B)
    return FoldedLayer(LayerShape(name, lora_B.shape[0], lora_A.shape[1]), lora_A, lora_B, scaling)


def _two_layers():
    folded = folded_adapter({}, {})
    layers = {
        "x.p": _layer("x.p", [[1.0, 2.0]], [[3.0], [4.0]], 0.5),
        "y.p": _layer("y.p", [[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [3.0, 4.0]], 3.0),
    }
    return type(folded)(layers=layers, saved={}, module_names=frozenset({"x", "y", "x.p", "y.p"}))


def test_uniform_by_hand():
    files = build(_two_layers(), "uniform")
    key = "base_model.model.x.p.lora_{}.weight"
    assert files.tensors[key.format("A")].tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert files.tensors[key.format("B")].tolist() == [[1.5, 0.0], [2.0, 0.0]]
    assert files.tensors["base_model.model.y.p.lora_B.weight"].tolist() == [[3.0, 6.0], [9.0, 12.0]]
    assert (files.config["r"], files.config["lora_alpha"]) == (2, 2)
    assert files.config["rank_pattern"] == files.config["alpha_pattern"] == {}


def test_compact_by_hand():
    files = build(_two_layers(), "compact")
    assert files.tensors["base_model.model.x.p.lora_B.weight"].tolist() == [[1.5], [2.0]]
    assert (files.config["r"], files.config["lora_alpha"]) == (2, 2)
    assert files.config["rank_pattern"] == files.config["alpha_pattern"] == {r"^x\.p": 1}


def test_per_rank_by_hand():
    # B <- s * rank / alpha * B: 0.5 * 1 / 2 for x, 3 * 2 / 2 for y.
    files = build(_two_layers(), "per_rank")
    assert files.tensors["base_model.model.x.p.lora_B.weight"].tolist() == [[0.75], [1.0]]
    assert files.tensors["base_model.model.y.p.lora_B.weight"].tolist() == [[3.0, 6.0], [9.0, 12.0]]
    assert files.config["rank_pattern"] == {r"^x\.p": 1}
    assert files.config["alpha_pattern"] == {}
    assert build(_two_layers(), "per_rank", lora_alpha=1).tensors["base_model.model.x.p.lora_B.weight"].tolist() == [
        [1.5],
        [2.0],
    ]


@pytest.mark.parametrize("layout", ["uniform", "compact", "per_rank"])
def test_the_configuration_is_plain(layout):
    config = json.loads(json.dumps(dict(build(_two_layers(), layout).config)))
    assert config["peft_type"] == "LORA"
    assert type(config["lora_alpha"]) is int
    assert config["use_rslora"] is config["use_dora"] is False
    assert config["bias"] == "none"
    assert config["init_lora_weights"] is config["inference_mode"] is True
    assert config["target_modules"] == ["p"]


@given(
    ranks=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    scalings=st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
    layout=st.sampled_from(["uniform", "compact", "per_rank"]),
)
@settings(max_examples=60, deadline=None)
def test_every_layout_holds_the_same_updates(ranks, scalings, layout):
    folded = folded_adapter(dict(zip(NAMES, ranks, strict=True)), dict(zip(NAMES, scalings, strict=True)))
    files = build(folded, layout)
    assert max(update_errors(files, folded).values()) < 3e-7
    stored = {key.split(".lora_")[0] for key in files.tensors}
    kept = NAMES if layout == "uniform" else [name for name, rank in zip(NAMES, ranks, strict=True) if rank]
    assert stored == {f"base_model.model.{name}" for name in kept}


def test_no_padded_slot_and_no_empty_layer_can_leak():
    files = build(folded_adapter({"a.q": 0, "b.q": 2, "c.q": 4}, dict.fromkeys(("a.q", "b.q", "c.q"), 2.0)), "uniform")
    assert not any(files.tensors[f"base_model.model.a.q.lora_{side}.weight"].any() for side in "AB")
    assert not files.tensors["base_model.model.b.q.lora_A.weight"][2:].any()
    assert not files.tensors["base_model.model.b.q.lora_B.weight"][:, 2:].any()


def test_an_adapter_without_ranks_becomes_zeros_of_rank_one_with_a_warning():
    for layout in ("uniform", "compact", "per_rank"):
        files = build(folded_adapter({"a.q": 0, "b.q": 0}, {"a.q": 1.0, "b.q": 1.0}), layout)
        assert files.config["r"] == files.config["lora_alpha"] == 1
        assert all(not tensor.any() and 1 in tensor.shape for tensor in files.tensors.values())
        assert len(files.tensors) == 4
        assert any("no layer has a rank" in note for note in files.notes)


def test_an_adapter_without_layers_is_refused():
    with pytest.raises(ExportError, match="no layer"):
        build(folded_adapter({}, {}), "uniform")


def test_float16_does_not_underflow_a_module_of_tiny_scaling():
    folded = folded_adapter({"a.q": 4}, {"a.q": 1e-8})
    unbalanced = folded.layers["a.q"].lora_B * 1e-8
    assert not unbalanced.half().any(), "the case must underflow without balancing"
    files = build(folded, "uniform", torch.float16)
    assert update_errors(files, folded)["a.q"] < 1e-2


def test_float16_and_bfloat16_stay_within_their_bound_and_leave_plain_factors_alone():
    folded = folded_adapter({"a.q": 4}, {"a.q": 2.0})
    for dtype in (torch.float16, torch.bfloat16):
        files = build(folded, "uniform", dtype)
        assert {tensor.dtype for tensor in files.tensors.values()} == {dtype}
        assert 0 < update_errors(files, folded)["a.q"] < 1e-2
        assert torch.equal(files.tensors["base_model.model.a.q.lora_A.weight"], folded.layers["a.q"].lora_A.to(dtype))


def test_what_float16_cannot_hold_is_refused():
    folded = folded_adapter({"a.q": 4}, {"a.q": 1e12})
    with pytest.raises(ExportError, match=r"a\.q\.lora_[AB] does not fit into torch.float16"):
        build(folded, "uniform", torch.float16)


def test_leaf_names_are_used_only_where_they_select_exactly_the_layers():
    ranks = {"a.0.q": 2, "a.1.q": 2}
    modules = {"a", "a.0", "a.1", *ranks}
    exact = folded_adapter(ranks, dict.fromkeys(ranks, 1.0), module_names=frozenset(modules))
    assert build(exact, "uniform").config["target_modules"] == ["q"]
    more = folded_adapter(ranks, dict.fromkeys(ranks, 1.0), module_names=frozenset(modules | {"head.q"}))
    files = build(more, "uniform")
    assert files.config["target_modules"] == ["a.0.q", "a.1.q"]
    assert any("leaf names would also select head.q" in note for note in files.notes)


def test_a_layer_of_rank_zero_does_not_spoil_leaf_names_in_uniform():
    ranks = {"a.0.q": 2, "a.1.q": 0}
    folded = folded_adapter(ranks, dict.fromkeys(ranks, 1.0), module_names=frozenset(ranks))
    assert build(folded, "uniform").config["target_modules"] == ["q"]
    assert build(folded, "compact").config["target_modules"] == ["a.0.q"]


def test_modules_to_save_are_no_targets_of_leaf_names():
    ranks = {"a.0.dense": 2}
    folded = folded_adapter(
        ranks, {"a.0.dense": 1.0}, module_names=frozenset({"a.0.dense", "head.dense"}), saved_modules=("head",)
    )
    assert build(folded, "uniform").config["target_modules"] == ["dense"]


def test_from_files_alone_the_source_list_of_leaf_names_is_kept():
    folded = folded_adapter({"a.0.q": 2}, {"a.0.q": 1.0}, targets=("q",))
    assert build(folded, "uniform").config["target_modules"] == ["q"]
    unknown = build(folded_adapter({"a.0.q": 2}, {"a.0.q": 1.0}), "uniform")
    assert unknown.config["target_modules"] == ["a.0.q"]
    assert any("without the base model" in note for note in unknown.notes)


def test_patterns_do_not_match_a_layer_whose_name_ends_alike():
    folded = folded_adapter(
        {"layers.1.q": 2, "layers.11.q": 3, "x.layers.1.q": 5},
        dict.fromkeys(("layers.1.q", "layers.11.q", "x.layers.1.q"), 1.0),
    )
    files = build(folded, "compact")
    assert max(update_errors(files, folded).values()) < 1e-6


@pytest.mark.parametrize(("r", "allowed"), [(1, 1), (2, 8), (9, 16), (200, 256), (321, 512), (513, None)])
def test_the_smallest_max_lora_rank_of_vllm(r, allowed):
    assert smallest_vllm_rank(r) == allowed


def test_a_peak_far_above_the_mean_is_a_warning():
    ranks = {f"l.{i}.q": 1 for i in range(9)} | {"l.9.q": 9}
    notes = build(folded_adapter(ranks, dict.fromkeys(ranks, 1.0)), "uniform").notes
    assert any("5.0 times the mean rank 1.80" in note for note in notes)
    even = dict.fromkeys(ranks, 2)
    assert not any("times the mean" in note for note in build(folded_adapter(even, dict.fromkeys(even, 1.0))).notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "unifrom"}, "'unifrom' is not one of uniform, compact, per_rank, merged"),
        ({"dtype": torch.float64}, "torch.float64 is not one of"),
        ({"rank": 1}, "rank: 1 is not allowed"),
        ({"layout": "compact", "rank": 8}, "only `uniform` is padded"),
        ({"layout": "per_rank", "lora_alpha": 0}, "an integer >= 1"),
        ({"lora_alpha": 4}, "only `per_rank` takes one"),
    ],
)
def test_arguments_out_of_range_say_what_is_allowed(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(_two_layers(), **arguments)


def test_merged_is_no_adapter():
    assert check_layout("merged") == "merged"
    with pytest.raises(ExportError, match="need the base model"):
        build(_two_layers(), "merged")


def test_no_two_tensors_share_memory_and_the_source_is_not_aliased():
    folded = folded_adapter({"a.q": 4, "b.q": 2}, {"a.q": 1.0, "b.q": 1.0})
    tensors = build(folded, "compact").tensors
    owned = [*tensors.values(), *(f for layer in folded.layers.values() for f in (layer.lora_A, layer.lora_B))]
    for first, second in itertools.combinations(owned, 2):
        assert first.data_ptr() != second.data_ptr()
