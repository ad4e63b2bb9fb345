"""Adapter folders are read by PEFT's own rules, and everything that is no plain LoRA is named."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from rankwise.errors import ArtifactError
from rankwise.export.files import (
    pattern_value,
    peft_rank,
    peft_scaling,
    read_adapter,
    split_tensors,
    undeclared_tensors,
)

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
KEY = "base_model.model.l.0.q.lora_{}.weight"
TENSORS = {KEY.format("A"): torch.ones(2, 3), KEY.format("B"): torch.ones(4, 2)}


def _write(folder, config=PLAIN, tensors=TENSORS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


SEGMENTS = st.sampled_from(["layers", "1", "11", "q_proj", "proj", "enc", "model"])
NAMES = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)
KEYS = st.one_of(NAMES, NAMES.map(lambda name: "^" + name.replace(".", r"\.")), st.just(".*proj"))


@given(keys=st.lists(KEYS, unique=True, max_size=4), name=NAMES)
@settings(max_examples=200, deadline=None)
def test_patterns_match_as_in_peft(keys, name):
    pattern = {key: float(i + 1) for i, key in enumerate(keys)}
    assert pattern_value(pattern, name, 0.0) == pattern.get(get_pattern_key(list(pattern), name), 0.0)


def test_the_published_traps_of_patterns():
    assert pattern_value({"layers.1.": 5}, "layers.11.q", 0) == 0
    general_first = {"q_proj": 2, "model.layers.3.self_attn.q_proj": 7}
    assert pattern_value(general_first, "model.layers.3.self_attn.q_proj", 0) == 2
    assert pattern_value({"proj": 2, "enc.proj": 3}, "enc.proj", 0) == 2
    assert pattern_value({"^proj": 2, r"^enc\.proj": 3}, "enc.proj", 0) == 3


def test_scaling_by_hand():
    config = {"r": 8, "lora_alpha": 16, "rank_pattern": {r"^a\.q": 4}, "alpha_pattern": {r"^b\.q": 3.5}}
    assert peft_rank(config, "a.q") == 4
    assert peft_scaling(config, "a.q") == 4.0
    assert peft_scaling(config, "b.q") == 3.5 / 8
    assert peft_scaling(config | {"use_rslora": True}, "a.q") == 16 / math.sqrt(4)


def test_a_plain_adapter_is_read_whole(tmp_path):
    files = read_adapter(_write(tmp_path / "a"))
    assert files.config == PLAIN
    assert files.tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"r": 0}, "r is 0, allowed: a whole number >= 1"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0"),
        ({"alpha_pattern": {"q(": 1}}, "not a regular expression"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_its_setting(tmp_path, change, message):
    with pytest.raises(ArtifactError, match=message):
        read_adapter(_write(tmp_path / "a", PLAIN | change))


def test_all_settings_at_fault_are_in_one_error(tmp_path):
    with pytest.raises(ArtifactError) as caught:
        read_adapter(_write(tmp_path / "a", PLAIN | {"use_dora": True, "bias": "all"}))
    assert "use_dora" in str(caught.value)
    assert "bias" in str(caught.value)


def test_a_truncated_file_a_missing_one_and_a_missing_folder_are_named(tmp_path):
    folder = _write(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        read_adapter(folder)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": ')
    with pytest.raises(ArtifactError, match="is not JSON"):
        read_adapter(folder)
    with pytest.raises(ArtifactError, match="is not a folder"):
        read_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({KEY.format("A"): torch.ones(2, 3)}, "lora_B is missing"),
        ({KEY.format("A"): torch.ones(2, 3), KEY.format("B"): torch.ones(4, 3)}, "the ranks differ"),
        ({KEY.format("A"): torch.ones(0, 3), KEY.format("B"): torch.ones(4, 0)}, "empty factors"),
        ({KEY.format("A"): torch.ones(2, 3, 1, 1), KEY.format("B"): torch.ones(4, 2, 1, 1)}, "only linear layers"),
        ({"base_model.model.wte.lora_embedding_A": torch.ones(2, 3)}, "not a factor of a linear layer"),
        ({"base_model.model.l.0.q.lora_magnitude_vector": torch.ones(3)}, "not a factor of a linear layer"),
        ({"base_model.model.classifier.weight": torch.ones(3, 3)}, "no lora_A or lora_B tensor"),
    ],
)
def test_tensors_that_are_no_pairs_of_matrices_are_refused(tensors, message):
    with pytest.raises(ArtifactError, match=message):
        split_tensors(tensors)


def test_saved_modules_are_told_from_undeclared_tensors():
    saved = ["classifier.weight", "bert.pooler.dense.bias", "bert.embeddings.word.weight"]
    assert undeclared_tensors(saved, ["classifier", "bert.pooler"]) == ["bert.embeddings.word.weight"]
