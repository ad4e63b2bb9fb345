"""Two gloo processes and one that averages their gradients agree (P-4); what cannot be gathered is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.test_two_processes import start
from tests.optimizers import workers

KINDS = pytest.mark.parametrize("kind", workers.KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, each having done everything once."""
    made = tmp_path_factory.mktemp("two")
    start(workers.everything, 2, made)
    return made


def worst_difference(folder: Path, work: Callable[[str, int], dict[str, Tensor]], kind: str) -> float:
    """Between two processes, which must agree to the bit, and one, relative to each factor's largest entry."""
    first, second = (load_file(folder / f"final-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    differences = [
        ((first[f"{work.__name__}.{kind}.{name}"] - value).abs().max() / value.abs().max()).item()
        for name, value in work(kind, 1).items()
    ]
    assert len(differences) == 8
    return max(differences)


@KINDS
def test_ddp_equals_one_process_with_averaged_gradients(folder: Path, kind: str) -> None:
    assert worst_difference(folder, workers.ddp, kind) <= 1e-9


@KINDS
def test_sharded_pairs_equal_one_process(folder: Path, kind: str) -> None:
    assert worst_difference(folder, workers.fsdp2, kind) <= 1e-4


def test_flat_shards_of_fsdp1_are_refused_with_what_works(folder: Path) -> None:
    for rank in range(2):
        lines = (folder / f"said-{rank}").read_text().splitlines()
        assert len(lines) == 2 * len(workers.KINDS)
        assert all("FSDP1" in line and "FSDP2" in line for line in lines)
