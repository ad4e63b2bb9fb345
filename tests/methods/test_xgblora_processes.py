"""Two gloo processes draw the same rounds and fold the boosters of one process, under DDP and under FSDP2."""

from pathlib import Path

import pytest
import torch

from tests.distributed.test_two_processes import run
from tests.methods import boosted_worker


@pytest.mark.slow
def test_x12_two_processes_are_one(tmp_path: Path) -> None:
    first, second = run(boosted_worker.together, 2, tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    expected = boosted_worker.alone()
    for kind in boosted_worker.KINDS:
        for name, value in expected.items():
            torch.testing.assert_close(first[f"{kind}: {name}"], value, rtol=1e-5, atol=1e-5, msg=f"{kind}: {name}")
