"""Two gloo processes and one that averages their gradients agree (P-4); what cannot be gathered is refused."""

from pathlib import Path

import torch

from tests.distributed.test_two_processes import run, start
from tests.optimizers import workers


def test_ddp_equals_one_process_with_averaged_gradients(tmp_path: Path) -> None:
    (alone,) = run(workers.ddp, 1, tmp_path / "one")
    first, second = run(workers.ddp, 2, tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name.split(".")[0] for name in first} == set(workers.KINDS)
    for name, value in alone.items():
        assert ((first[name] - value).abs().max() / value.abs().max()).item() <= 1e-9, name


def test_sharded_pairs_equal_one_process(tmp_path: Path) -> None:
    (alone,) = run(workers.fsdp2, 1, tmp_path / "one")
    first, second = run(workers.fsdp2, 2, tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in alone.items():
        assert torch.allclose(first[name], value, rtol=1e-4, atol=1e-4), name


def test_flat_shards_of_fsdp1_are_refused_with_what_works(tmp_path: Path) -> None:
    start(workers.fsdp1, 2, tmp_path / "run")
    for rank in range(2):
        for line in (tmp_path / "run" / f"said-{rank}").read_text().splitlines():
            assert "FSDP1" in line
            assert "FSDP2" in line
