"""The emulated rules give the numbers that were measured on the real engines or follow by hand from their rules."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import ConfigError, ExportError
from rankwise.export.consumers import (
    CONSUMERS,
    EXPORT_TARGETS,
    RULES,
    Facts,
    audit_files,
    consumer_layout,
    consumers_of,
    refuse_consumers,
    rule_errors,
    tgi_rank,
)
from rankwise.export.layouts import build
from tests.export.trained import folded_adapter, native_files

RANKS = {f"model.layers.{i}.mlp.up_proj": rank for i, rank in enumerate((1, 2, 4, 8, 16))}
SQUARE_ROOT = {name: 16 / math.sqrt(rank) for name, rank in RANKS.items()}


def _pattern(ranks):
    return {"^" + re.escape(name): rank for name, rank in ranks.items()}


def _verdicts(config, tensors):
    return {verdict.consumer: verdict for verdict in audit_files(config, tensors)}


def _statuses(config, tensors):
    return {name: verdict.status for name, verdict in _verdicts(config, tensors).items()}


def test_native_rslora_with_ranks_1_to_16_is_off_by_the_published_errors():
    # s_i = 16/sqrt(r_i), r = 8. Rank 1 needs 16: (b) uses 16/sqrt(8), (c) 16/8. Rank 16 needs 4: (d) uses 1.
    config, tensors = native_files(
        folded_adapter(RANKS, SQUARE_ROOT), r=8, lora_alpha=16, use_rslora=True, rank_pattern=_pattern(RANKS)
    )
    errors = rule_errors(config, tensors)
    assert errors["a"] == 0
    assert errors["b"] == pytest.approx(1 - 1 / math.sqrt(8), rel=1e-12)
    assert errors["c"] == pytest.approx(0.875, rel=1e-12)
    assert errors["d"] == pytest.approx(0.75, rel=1e-12)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("uniform", {"a": 0, "b": 0, "c": 0, "d": 0}),
        ("compact", {"a": 0, "b": 0, "c": 0, "d": 15}),
        ("per_rank", {"a": 0, "b": 15 / 16, "c": 15 / 16, "d": 0}),
    ],
)
def test_layouts_have_the_published_errors_under_each_rule(layout, expected):
    files = build(folded_adapter(RANKS, SQUARE_ROOT), layout)
    assert rule_errors(files.config, files.tensors) == pytest.approx(expected, abs=1e-12)


def test_the_rules_themselves_by_hand():
    folded = folded_adapter({"a.x": 2, "b.x": 4}, {"a.x": 1.0, "b.x": 1.0})
    config, tensors = native_files(
        folded, r=4, lora_alpha=6, use_rslora=True, rank_pattern={"^a\\.x": 2}, alpha_pattern={"^a\\.x": 3}
    )
    facts = Facts.of(config, tensors)
    assert RULES["a"](facts) == pytest.approx({"a.x": 3 / math.sqrt(2), "b.x": 3.0})
    assert RULES["b"](facts) == {"a.x": 3.0, "b.x": 3.0}
    assert RULES["c"](facts) == {"a.x": 1.5, "b.x": 1.5}
    assert RULES["d"](facts) == {"a.x": 3.0, "b.x": 1.5}


def test_native_uneven_adapters_are_flagged_as_the_engines_were_measured():
    folded = folded_adapter(RANKS, SQUARE_ROOT)
    for extra in ({"use_rslora": True}, {"alpha_pattern": _pattern(RANKS)}):
        config, tensors = native_files(folded, r=8, lora_alpha=16, rank_pattern=_pattern(RANKS), **extra)
        statuses = _statuses(config, tensors)
        assert {name: statuses[name] for name in ("peft", "transformers", "vllm")} == dict.fromkeys(
            ("peft", "transformers", "vllm"), "ok"
        )
        assert (statuses["vllm<=0.31"], statuses["llama.cpp"], statuses["sglang"]) == ("wrong", "wrong", "refuses")


def test_uniform_with_an_empty_layer_is_served_right_by_every_consumer_that_was_run():
    ranks = RANKS | {"model.layers.5.mlp.up_proj": 0}
    for dtype in (torch.float32, torch.bfloat16):
        files = build(folded_adapter(ranks, SQUARE_ROOT | {"model.layers.5.mlp.up_proj": 1.0}), "uniform", dtype)
        assert set(_statuses(files.config, files.tensors).values()) == {"ok"}


@pytest.mark.parametrize(
    ("layout", "wrong", "refuses"),
    [
        ("compact", {"llama.cpp", "ollama"}, {"sglang", "tgi", "vllm-omni"}),
        ("per_rank", {"vllm<=0.31"}, {"sglang", "tgi", "vllm-omni"}),
    ],
)
def test_uneven_layouts_are_flagged_as_the_engines_were_measured(layout, wrong, refuses):
    files = build(folded_adapter(RANKS, SQUARE_ROOT), layout)
    statuses = _statuses(files.config, files.tensors)
    assert {name for name, status in statuses.items() if status == "wrong"} == wrong
    assert {name for name, status in statuses.items() if status == "refuses"} == refuses


def test_one_rank_with_rslora_is_misread_by_those_who_ignore_it_only():
    config, tensors = native_files(folded_adapter({"l.0.q": 4}, {"l.0.q": 8.0}), r=4, lora_alpha=16, use_rslora=True)
    verdicts = _verdicts(config, tensors)
    assert {name for name, v in verdicts.items() if v.status == "wrong"} == {"sglang", "llama.cpp", "ollama"}
    assert verdicts["sglang"].error == pytest.approx(0.5)
    assert "multiplier 4, right is 8" in verdicts["sglang"].reason


def test_one_rank_with_uneven_alphas_is_right_only_where_patterns_are_read():
    folded = folded_adapter({"l.0.q": 4, "l.1.q": 4}, {"l.0.q": 1.0, "l.1.q": 2.0})
    config, tensors = native_files(folded, r=4, lora_alpha=4, alpha_pattern={"^l\\.1\\.q": 8})
    statuses = _statuses(config, tensors)
    assert {name for name, status in statuses.items() if status == "ok"} == {"peft", "transformers", "vllm"}
    assert statuses["vllm-omni"] == "refuses"
    assert {statuses[name] for name in ("vllm<=0.31", "sglang", "llama.cpp", "ollama", "tgi")} == {"wrong"}


def test_a_float_alpha_is_refused_by_ollama_only():
    config, tensors = native_files(folded_adapter({"l.0.q": 8}, {"l.0.q": 1.0}), r=8, lora_alpha=12.5)
    assert {n for n, s in _statuses(config, tensors).items() if s != "ok"} == {"ollama"}


def test_alpha_zero_means_one_in_llama_cpp():
    config, tensors = native_files(folded_adapter({"l.0.q": 8}, {"l.0.q": 1.0}), r=8, lora_alpha=0)
    verdicts = _verdicts(config, tensors)
    assert verdicts["llama.cpp"].error == math.inf
    assert verdicts["llama.cpp"].to_dict()["error"] == "inf"
    assert verdicts["vllm"].status == "ok"


def test_a_regular_expression_is_refused_by_sglang_only():
    config, tensors = native_files(folded_adapter({"l.0.q": 8}, {"l.0.q": 1.0}), r=8, lora_alpha=8)
    config["target_modules"] = r".*\.q"
    assert {n for n, s in _statuses(config, tensors).items() if s != "ok"} == {"sglang"}


def test_saved_modules_are_for_peft_and_transformers_only():
    config, tensors = native_files(folded_adapter({"l.0.q": 8}, {"l.0.q": 1.0}), r=8, lora_alpha=8)
    tensors["base_model.model.classifier.weight"] = torch.zeros(2, 2)
    assert {n for n, s in _statuses(config, tensors).items() if s == "ok"} == {"peft", "transformers"}


def test_a_rank_above_512_is_refused_by_vllm():
    folded = folded_adapter({"l.0.q": 513}, {"l.0.q": 1.0})
    config, tensors = native_files(folded, r=513, lora_alpha=513)
    assert _statuses(config, tensors)["vllm"] == "refuses"


def test_a_rank_that_contradicts_the_configuration_is_refused_by_peft():
    config, tensors = native_files(folded_adapter({"l.0.q": 4}, {"l.0.q": 1.0}), r=8, lora_alpha=8)
    assert _verdicts(config, tensors)["peft"].reason == "l.0.q has rank 4 in the file and 8 by the configuration"


@pytest.mark.parametrize(("rank", "padded"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 48)])
def test_tgi_pads_to_8_or_a_multiple_of_16(rank, padded):
    assert tgi_rank(rank) == padded


def test_tgi_scales_later_types_by_the_padded_rank():
    names = {"l.0.q": 12, "l.0.v": 12}
    folded = folded_adapter(names, dict.fromkeys(names, 1.0))
    files = build(folded, "uniform")
    assert _verdicts(files.config, files.tensors)["tgi"].error == pytest.approx(1 - 12 / 16)
    padded = build(folded, "uniform", rank=tgi_rank(12))
    assert _verdicts(padded.config, padded.tensors)["tgi"].status == "ok"


def test_tgi_drops_a_projection_type_that_one_layer_lacks():
    names = {"l.0.q": 8, "l.1.q": 8, "l.0.v": 8}
    files = build(folded_adapter(names, dict.fromkeys(names, 1.0)), "compact")
    verdict = _verdicts(files.config, files.tensors)["tgi"]
    assert (verdict.status, verdict.error) == ("wrong", 1.0)
    assert verdict.reason.startswith("l.0.v: multiplier 0")


def test_a_zero_update_cannot_be_scaled_wrong():
    folded = folded_adapter({"l.0.q": 4}, {"l.0.q": 8.0})
    config, tensors = native_files(folded, r=4, lora_alpha=16, use_rslora=True)
    tensors["base_model.model.l.0.q.lora_B.weight"] = torch.zeros(6, 4)
    assert set(_statuses(config, tensors).values()) == {"ok"}


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    r=st.integers(1, 6),
    alpha=st.integers(1, 20),
    rslora=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_the_error_of_a_rule_is_the_relative_difference_of_dense_updates(ranks, r, alpha, rslora, data):
    names = {f"l.{i}.q": rank for i, rank in enumerate(ranks)}
    alphas = {name: data.draw(st.integers(1, 20)) for name in names}
    folded = folded_adapter(names, dict.fromkeys(names, 1.0))
    config, tensors = native_files(
        folded,
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        rank_pattern=_pattern(names),
        alpha_pattern=_pattern(alphas),
    )
    facts = Facts.of(config, tensors)
    for rule, scaling in RULES.items():
        worst = 0.0
        for name, layer in folded.layers.items():
            product = layer.lora_B.double() @ layer.lora_A.double()
            true = product * alphas[name] / (names[name] ** 0.5 if rslora else names[name])
            served = product * scaling(facts)[name]
            worst = max(worst, float((served - true).norm() / true.norm()))
        assert rule_errors(config, tensors)[rule] == pytest.approx(worst, rel=1e-9, abs=1e-12)


def test_every_export_target_maps_to_a_layout_and_known_consumers():
    assert {target: consumer_layout(target) for target in EXPORT_TARGETS} == {
        "peft": "uniform",
        "vllm": "uniform",
        "sglang": "uniform",
        "tgi": "uniform",
        "gguf": "uniform",
        "ollama": "uniform",
        "merged": "merged",
    }
    assert all(name in CONSUMERS for target in EXPORT_TARGETS for name in consumers_of(target))


def test_mlx_is_refused_because_it_reads_no_adapter_folder():
    with pytest.raises(ExportError, match="mlx-lm reads its own format"):
        consumer_layout("mlx")


def test_an_unknown_target_names_the_allowed_ones():
    with pytest.raises(ConfigError, match=r"'vlm' is not one of peft, vllm, sglang, tgi, gguf, ollama, merged, mlx"):
        consumers_of("vlm")


def test_compact_is_refused_for_llama_cpp_with_the_size_of_the_error():
    files = build(folded_adapter(RANKS, SQUARE_ROOT), "compact")
    with pytest.raises(ExportError, match=r"llama.cpp 2026-10: wrong \(updates wrong by 15 of their size\)"):
        refuse_consumers(("gguf",), files.config, files.tensors)
    refuse_consumers(("peft", "vllm"), files.config, files.tensors)
