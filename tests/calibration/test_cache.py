"""A cache file answers the question it was asked, and no other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from rankwise.calibration.cache import load_statistics, save_statistics, statistics_fingerprint
from rankwise.calibration.collect import collect
from rankwise.calibration.statistics import GradientStatistics
from rankwise.errors import ArtifactError, CalibrationError
from tests.calibration.support import EVERYTHING, GRADIENT, targets
from tests.calibration.test_batches import Experts, chain_loss
from tests.support.models import causal_batch, tiny_llama

BATCHES = [causal_batch(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def taken() -> GradientStatistics:
    model = tiny_llama()
    return collect(model, targets(model), BATCHES, EVERYTHING, memory="sampled")


def assert_same(found: GradientStatistics, wanted: GradientStatistics) -> None:
    assert replace(found, layers={}) == replace(wanted, layers={}, from_cache=True)
    assert list(found.layers) == list(wanted.layers)
    for name, layer in wanted.layers.items():
        assert (found.layers[name].shape, found.layers[name].batches) == (layer.shape, layer.batches)
        for kind in ("gradient", "projection", "left_projection", "scores", "score_errors"):
            first, second = getattr(found.layers[name], kind), getattr(layer, kind)
            assert (first is None and second is None) or (torch.equal(first, second) and first.dtype == second.dtype)


def test_statistics_come_back_bit_for_bit(taken, tmp_path):
    path = tmp_path / "deep" / "cache.safetensors"
    save_statistics(path, taken, "model=1;data=2")
    assert_same(load_statistics(path, "model=1;data=2"), taken)
    assert [file.name for file in path.parent.iterdir()] == ["cache.safetensors"]


def test_whole_gradients_and_unreached_layers_come_back_too(tmp_path):
    model = Experts()
    batches = [(torch.ones(2, 3), True)]
    found = collect(model, targets(model), batches, GRADIENT, on_unused="min", loss=chain_loss)
    save_statistics(tmp_path / "cache.safetensors", found, "x")
    assert_same(load_statistics(tmp_path / "cache.safetensors", "x"), found)


def test_no_file_is_no_statistics(tmp_path):
    assert load_statistics(tmp_path / "none.safetensors", "x") is None


def test_another_fingerprint_is_refused_and_says_what_differs(taken, tmp_path):
    path = tmp_path / "cache.safetensors"
    save_statistics(path, taken, "model=1;data=2;targets=3")
    with pytest.raises(CalibrationError, match="taken with another data and another targets"):
        load_statistics(path, "model=1;data=9;targets=8")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "foreign", "header"])
def test_a_damaged_file_is_an_artifact_error(taken, tmp_path, damage):
    path = tmp_path / "cache.safetensors"
    save_statistics(path, taken, "x")
    content = path.read_bytes()
    if damage == "foreign":
        save_file({"a": torch.zeros(1)}, path)
    elif damage == "header":
        with safe_open(path, framework="pt") as file:
            save_file(load_file(path), path, metadata={**file.metadata(), "statistics": "{}"})
    else:
        flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        cut = content[: len(content) // 2]
        path.write_bytes({"truncated": cut, "flipped": flipped, "empty": b"", "text": b"not a file"}[damage])
    with pytest.raises(ArtifactError, match=r"cache\.safetensors (is|has)"):
        load_statistics(path, "x")


def parts(**changes: object) -> dict[str, str]:
    """The named parts of a fingerprint; `model`, `layers`, `batches` and `request` replace those arguments."""
    model = changes.pop("model", None) or tiny_llama()
    layers = changes.pop("layers", None) or targets(model)
    batches = changes.pop("batches", None) or BATCHES
    request = changes.pop("request", None) or EVERYTHING
    line = statistics_fingerprint(model, layers, batches, request, **changes)
    return dict(part.split("=") for part in line.split(";"))


def test_the_same_question_has_the_same_fingerprint():
    copies = [{key: value.clone() for key, value in batch.items()} for batch in BATCHES]
    assert parts() == parts(batches=copies)
    assert parts(max_batches=2) == parts(batches=BATCHES[:2], max_batches=2)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": tiny_llama(seed=1)}, "model"),
        ({"batches": BATCHES[::-1]}, "data"),
        ({"max_batches": 2}, "data"),
        ({"data_identity": "other"}, "data"),
        ({"layers": targets(tiny_llama())[1:]}, "targets"),
        ({"request": replace(EVERYTHING, identity="gamma")}, "request"),
        ({"request": GRADIENT}, "request"),
        ({"loss": chain_loss}, "loss"),
        ({"memory": "low"}, "settings"),
        ({"sample_share": 0.5}, "settings"),
        ({"seed": 1}, "settings"),
        ({"train_mode": True}, "settings"),
        ({"token_weighted": False}, "settings"),
        ({"autocast_dtype": torch.bfloat16}, "settings"),
    ],
)
def test_each_ingredient_changes_its_own_part_alone(changes, part):
    first, second = parts(), parts(**changes)
    assert [name for name in first if first[name] != second[name]] == [part]


def test_one_changed_bit_of_a_batch_or_a_weight_counts():
    batches = [{**BATCHES[0], "labels": BATCHES[0]["labels"].clone()}, *BATCHES[1:]]
    batches[0]["labels"][1, 3] += 1
    assert parts(batches=batches)["data"] != parts()["data"]
    long = np.arange(5000)
    other = long.copy()
    other[2500] = 0  # numpy's text leaves out the middle of long arrays; their bits count
    assert parts(batches=[{"x": long}])["data"] != parts(batches=[{"x": other}])["data"]
    model = tiny_llama()
    model.model.norm.weight.data[0] = torch.nextafter(model.model.norm.weight[0], torch.tensor(2.0))
    assert parts(model=model)["model"] != parts()["model"]


@pytest.mark.parametrize("changed", [{"hidden_act": "relu"}, {"rms_norm_eps": 1e-2}])
def test_the_same_weights_under_another_configuration_are_another_model(changed):
    """The activation and its like change every gradient and no weight."""
    fingerprints = set()
    for settings in ({}, changed):
        config = tiny_llama().config
        for key, value in settings.items():
            setattr(config, key, value)
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        fingerprints.add(statistics_fingerprint(model, targets(model), BATCHES, EVERYTHING))
    assert len(fingerprints) == 2
