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

from rankwise.training.marker import checkpoint_step, complete_checkpoints, last_complete_checkpoint, read_marker
from tests.training import sabotage
from tests.training.children import finish, start, wait_for
from tests.training.jobs import RECIPES, Job, final

KILLED = -int(signal.SIGKILL)


JOB = Job(folder="", scheduler="constant_with_warmup")


@cache
def undisturbed(loop: str, method: str, steps: int, scheduler: str) -> dict[str, Tensor]:
    """What a run ends with that nobody kills; how often it saves changes nothing."""
    folder = mkdtemp(prefix="undisturbed-")
    job = Job(folder=folder, loop=loop, method=method, steps=steps, scheduler=scheduler, save_steps=100)
    assert finish(start(job)) == 0
    return final(Path(folder))


def assert_equal_bits(job: Job) -> None:
    ours, wanted = final(Path(job.folder)), undisturbed(job.loop, job.method, job.steps, job.scheduler)
    assert ours.keys() == wanted.keys()
    assert [name for name in ours if not torch.equal(ours[name], wanted[name])] == []


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=[] if moment in sabotage.TELLING else [pytest.mark.slow], id=moment.__name__)
        for moment in sabotage.MOMENTS
    ],
)
def test_a_run_killed_at_the_worst_moment_goes_on_as_if_nothing_had_happened(tmp_path: Path, moment):
    job = replace(JOB, folder=str(tmp_path))
    assert finish(start(job, moment)) == KILLED
    assert last_complete_checkpoint(tmp_path) is not None
    assert finish(start(job)) == 0
    assert_equal_bits(job)
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [9]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path):
    job = replace(JOB, folder=str(tmp_path), save_steps=100)
    assert finish(start(job, sabotage.after_the_first_step)) == KILLED
    assert last_complete_checkpoint(tmp_path) is None
    assert finish(start(job)) == 0
    assert_equal_bits(job)


def kill_at_random(job: Job, chance: random.Random, *, times: int) -> None:
    """Kills the run from outside, a random moment after a new checkpoint folder appears."""
    folder = Path(job.folder)
    for _ in range(times):
        known = {path.name for path in folder.glob("checkpoint-*")}
        process = start(job)
        wait_for(lambda known=known: something_new(folder, known), process, folder)
        process.join(chance.uniform(0.0, 0.12))
        process.kill()
        assert finish(process) in (KILLED, 0)


def something_new(folder: Path, known: set[str]) -> bool:
    names = {path.name for path in folder.glob("checkpoint-*")}
    return bool(names - known) or (folder / "final.safetensors").exists()


def test_a_run_killed_from_outside_at_a_random_moment_ends_bit_equal(tmp_path: Path):
    job = replace(JOB, folder=str(tmp_path), save_steps=1, keep=2)
    kill_at_random(job, random.Random(11), times=1)
    assert finish(start(job)) == 0
    assert_equal_bits(job)


@pytest.mark.parametrize("method", ["gora lora-rite", "xgblora", "xgblora merge"])
def test_a_recipe_killed_before_its_marker_ends_bit_equal(tmp_path: Path, method: str):
    job = replace(JOB, folder=str(tmp_path), method=method)
    assert finish(start(job, sabotage.before_the_marker)) == KILLED
    assert finish(start(job)) == 0
    assert_equal_bits(job)


def test_a_run_killed_between_a_snapshot_and_its_reset_ends_bit_equal(tmp_path: Path):
    """The checkpoint that goes on is that of step 2: it holds the past which the reset after step 3 copies from."""
    job = replace(JOB, folder=str(tmp_path), method="beamlora")
    assert finish(start(job, sabotage.before_the_marker)) == KILLED
    checkpoint = last_complete_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint_step(checkpoint) == 2
    values = read_marker(checkpoint)["schedule"]["values"]
    assert (values["snapshot_step"], values["period"]) == (2, 3)
    assert finish(start(job)) == 0
    assert_equal_bits(job)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["trainer", "sft"])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_over_and_over_ends_bit_equal(tmp_path: Path, loop: str, seed: int):
    job = Job(folder=str(tmp_path), loop=loop, method="gora", steps=30, save_steps=1, keep=1)
    kill_at_random(job, random.Random(seed), times=8)
    assert finish(start(job)) == 0
    assert_equal_bits(job)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["trainer", "sft", "accelerate"])
@pytest.mark.parametrize("method", RECIPES)
def test_every_recipe_killed_over_and_over_ends_bit_equal(tmp_path: Path, method: str, loop: str):
    job = Job(folder=str(tmp_path), loop=loop, method=method, steps=20, save_steps=1, keep=2)
    kill_at_random(job, random.Random(f"{method} {loop}"), times=5)
    assert finish(start(job)) == 0
    assert_equal_bits(job)
