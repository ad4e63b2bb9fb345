"""The harness itself: it follows the manifest, skips visibly, and notices what is wrong."""

import json
from pathlib import Path

import pytest
import torch

from tests.golden.manifest import (
    assert_declared,
    file_cases,
    golden_folder,
    load_tensors,
    own_stream,
    relative_error,
)


def test_a_folder_without_the_family_gives_one_visible_skip(tmp_path: Path) -> None:
    (only,) = file_cases(tmp_path, "gora", "allocation")
    assert only.id == "gora-allocation-none"
    assert only.marks[0].name == "skip"


def test_cases_and_ids_come_from_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "gora_manifest.json").write_text(json.dumps({"init": [{"file": "gora_init_99_other.safetensors"}]}))
    (only,) = file_cases(tmp_path, "gora", "init")
    assert only.id == "gora-gora_init_99_other"
    assert file_cases(tmp_path, "gora", "allocation")[0].marks


def test_the_folder_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_GOLDEN_DIR", str(tmp_path))
    assert golden_folder() == tmp_path
    monkeypatch.setenv("RANKWISE_GOLDEN_DIR", str(tmp_path / "missing"))
    with pytest.raises(pytest.UsageError, match="missing"):
        golden_folder()


def test_a_missing_file_or_another_shape_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="does not hold"):
        load_tensors(tmp_path, "gora_init_00.safetensors")
    with pytest.raises(AssertionError):
        assert_declared({"A": torch.zeros(2, 3)}, {"A": ("torch.float32", [3, 2])})
    with pytest.raises(AssertionError):
        assert_declared({"A": torch.zeros(2, 3)}, {"A": ("torch.bfloat16", [2, 3])})


def test_the_error_is_relative_to_the_largest_reference() -> None:
    assert relative_error(torch.tensor([1.0, 4.2]), torch.tensor([1.0, 4.0])) == pytest.approx(0.05)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")


def test_the_stream_is_that_of_the_global_seed() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1007)
        assert torch.equal(torch.randn(5, 3), torch.randn(5, 3, generator=own_stream(1007)))
