"""Reads the golden folder as golden/README.md asks: cases come from the manifests, fields decide how a case is run."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

OWN_COPY = Path(__file__).parent / "cases"


def golden_folder() -> Path:
    """RANKWISE_GOLDEN_DIR, by default the repository's own copy; a folder that is named and missing is an error."""
    folder = Path(os.environ.get("RANKWISE_GOLDEN_DIR") or OWN_COPY)
    if not folder.is_dir():
        raise pytest.UsageError(f"RANKWISE_GOLDEN_DIR: {folder} is not a folder")
    return folder


def read_manifest(folder: Path, family: str) -> dict[str, Any] | None:
    path = folder / f"{family}_manifest.json"
    return json.loads(path.read_text()) if path.is_file() else None


def case_parameters(folder: Path, family: str, block: str, cases: Iterable[tuple[str, Any]]) -> list[Any]:
    """One parameter a case, its id holding family and case; one visible skip where the folder has none."""
    found = [pytest.param(case, id=f"{family}-{name}") for name, case in cases]
    reason = f"no {block} case of {family} in {folder}"
    return found or [pytest.param(None, id=f"{family}-{block}-none", marks=pytest.mark.skip(reason=reason))]


def file_cases(folder: Path, family: str, block: str) -> list[Any]:
    """The cases of a manifest's block that name one file each."""
    entries = (read_manifest(folder, family) or {}).get(block, [])
    return case_parameters(folder, family, block, ((Path(entry["file"]).stem, entry) for entry in entries))


def load_tensors(folder: Path, file: str) -> dict[str, Tensor]:
    path = folder / file
    assert path.is_file(), f"the manifest names {file}, and {folder} does not hold it"
    return load_file(path)


def assert_declared(tensors: Mapping[str, Tensor], declared: Mapping[str, tuple[str, list[int]]]) -> None:
    """Every declared tensor is there with its dtype and shape, and no other."""
    assert {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()} == {
        name: (dtype, list(shape)) for name, (dtype, shape) in declared.items()
    }


def relative_error(found: Tensor, reference: Tensor) -> float:
    """max |found - reference| / max |reference|; 0 or inf where the reference is zero."""
    found, reference = found.double(), reference.double()
    assert found.shape == reference.shape
    assert found.isfinite().all()
    difference, largest = (found - reference).abs().max().item(), reference.abs().max().item()
    if largest == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / largest


def own_stream(seed: int) -> torch.Generator:
    """The stream of torch.manual_seed(seed), without touching the global one."""
    return torch.Generator().manual_seed(seed)
