"""Two gloo processes under FSDP2 take the steps that one process takes without it, noise and momentum included."""

from pathlib import Path

import pytest
import torch

from tests.distributed.test_two_processes import run
from tests.methods import ggpo_worker


@pytest.mark.slow
def test_g8_fsdp2_in_two_processes_is_one_process_and_a_model_sharded_too_early_is_refused(tmp_path: Path) -> None:
    first, second = run(ggpo_worker.sharded, 2, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain = {}
    for name in ggpo_worker.RUNS:
        one, schedule, _ = ggpo_worker.prepared(name)
        found = ggpo_worker.run(one, schedule, 0, 1)
        assert found
        for key, value in found.items():
            torch.testing.assert_close(first[f"{name}: {key}"], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
        plain[name] = found
    for name in ("ggpo", "mgpo", "mgpo own"):  # and the perturbation is there
        moved = [
            float((plain[name][key] - value).abs().max()) for key, value in plain["lora"].items() if key.endswith(".B")
        ]
        assert min(moved) > 1e-4
    assert "sharded already: attach before fully_shard" in (tmp_path / "refused-0").read_text()
