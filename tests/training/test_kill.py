"""A run that is killed at any moment and started again ends bit for bit as an undisturbed one."""

import random
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch import Tensor

from rankwise.training.marker import checkpoint_step, complete_checkpoints, last_complete_checkpoint
from tests.training import sabotage
from tests.training.children import finish, start, wait_for
from tests.training.jobs import Job, final

KILLED = -int(signal.SIGKILL)


@cache
def undisturbed(job: Job) -> dict[str, Tensor]:
    folder = Path(mkdtemp(prefix="undisturbed-"))
    assert finish(start(replace(job, folder=str(folder)))) == 0
    return final(folder)


def assert_equal_bits(folder: Path, job: Job) -> None:
    ours, wanted = final(folder), undisturbed(replace(job, folder=""))
    assert ours.keys() == wanted.keys()
    different = [name for name in ours if not torch.equal(ours[name], wanted[name])]
    assert not different


@pytest.mark.parametrize("moment", sabotage.MOMENTS, ids=lambda moment: moment.__name__)
def test_a_run_killed_at_the_worst_moment_goes_on_as_if_nothing_had_happened(tmp_path: Path, moment):
    job = Job(folder=str(tmp_path), scheduler="constant_with_warmup")
    assert finish(start(job, moment)) == KILLED
    assert last_complete_checkpoint(tmp_path) is not None
    assert finish(start(job)) == 0
    assert_equal_bits(tmp_path, job)
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [9]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path):
    job = Job(folder=str(tmp_path), save_steps=100)
    assert finish(start(job, sabotage.after_the_first_step)) == KILLED
    assert last_complete_checkpoint(tmp_path) is None
    assert finish(start(job)) == 0
    assert_equal_bits(tmp_path, job)


def kill_at_random(job: Job, chance: random.Random, *, times: int) -> None:
    """Kills the run from outside as soon as some checkpoint folder appears, after a random share of a step."""
    folder = Path(job.folder)
    for _ in range(times):
        known = {path.name for path in folder.glob("checkpoint-*")}
        process = start(job)
        wait_for(
            lambda known=known: {p.name for p in folder.glob("checkpoint-*")} - known or final_is_there(folder),
            process,
            folder,
        )
        process.join(chance.uniform(0.0, 0.12))
        process.kill()
        assert finish(process) in (KILLED, 0)


def final_is_there(folder: Path) -> bool:
    return (folder / "final.safetensors").exists()


def test_a_run_killed_from_outside_at_random_moments_ends_bit_equal(tmp_path: Path):
    job = Job(folder=str(tmp_path), method="gora", steps=14, save_steps=1, keep=2)
    kill_at_random(job, random.Random(11), times=2)
    assert finish(start(job)) == 0
    assert_equal_bits(tmp_path, job)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["trainer", "sft"])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_over_and_over_ends_bit_equal(tmp_path: Path, loop: str, seed: int):
    job = Job(folder=str(tmp_path), loop=loop, method="gora", steps=30, save_steps=1, keep=1)
    kill_at_random(job, random.Random(seed), times=8)
    assert finish(start(job)) == 0
    assert_equal_bits(tmp_path, job)
