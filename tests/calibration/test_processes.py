"""Two processes take the statistics that one process takes, and fail together."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankwise.calibration import processes
from rankwise.calibration.collect import collect
from rankwise.errors import CalibrationError
from tests.calibration import worker
from tests.calibration.support import GRADIENT, targets

ROOT = Path(__file__).parents[2]


def test_without_a_process_group_every_collective_is_a_no_op():
    tensor = torch.ones(2)
    assert processes.all_reduce_sum(tensor) is tensor
    assert (processes.world_size(), processes.process_index()) == (1, 0)
    assert processes.broadcast_object("plan") == "plan"
    assert processes.gather_objects(3) == [3]
    processes.assert_equal_everywhere("hash", "the plan")


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    """What two gloo processes found, as files; see worker.py."""
    folder = tmp_path_factory.mktemp("processes")
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.calibration.worker", str(rank), "2", str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in workers:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    return folder


@pytest.mark.parametrize("case", sorted(worker.CASES))
def test_two_processes_take_the_statistics_of_one(answers, case):
    model = worker.toy()
    alone = collect(model, targets(model), **{**worker.DEFAULTS, **worker.CASES[case]})
    both = [torch.load(answers / f"{case}-{rank}.pt", weights_only=False) for rank in range(2)]
    for found in both:
        assert (found.batches, found.skipped, found.tokens) == (alone.batches, alone.skipped, alone.tokens)
        assert found.loss == pytest.approx(alone.loss, rel=1e-6)
    for name, layer in alone.layers.items():
        first, second = (found.layers[name] for found in both)
        assert first.batches == layer.batches
        for kind in ("gradient", "projection", "left_projection", "scores", "score_errors"):
            wanted, found = getattr(layer, kind), getattr(first, kind)
            if wanted is None:
                assert found is None
                continue
            assert torch.equal(found, getattr(second, kind))
            assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5


def test_every_batch_runs_in_one_process_alone(answers):
    runs = [(answers / f"runs-{rank}.txt").read_text().split() for rank in range(2)]
    assert runs == [["0", "2", "4"], ["1", "3"]]


def test_a_failure_in_one_process_ends_both(answers):
    assert (
        answers / "failure-0.txt"
    ).read_text() == "CalibrationError: calibration failed in process 1: KeyError: 'boom'"
    assert (answers / "failure-1.txt").read_text() == "KeyError: 'boom'"


def test_differing_plans_are_an_error_in_both(answers):
    for rank in range(2):
        message = (answers / f"differ-{rank}.txt").read_text()
        assert message.startswith(
            "CalibrationError: the plan differs between processes: process 0 has 'a', process 1 has 'b'"
        )


def test_an_error_in_the_process_that_decides_is_raised_in_all(answers):
    told = [(answers / f"first-{rank}.txt").read_text() for rank in range(2)]
    assert told == ["ArtifactError: the cache is damaged"] * 2


def test_process_zero_decides_what_is_broadcast(answers):
    assert [(answers / f"broadcast-{rank}.txt").read_text() for rank in range(2)] == ["0", "0"]


def test_more_processes_than_batches_are_no_error(answers):
    model = worker.toy()
    alone = collect(model, targets(model), worker.BATCHES[:1], GRADIENT, loss=worker.mean_square)
    for rank in range(2):
        found = torch.load(answers / f"single-{rank}.pt", weights_only=False)
        assert found.batches == 1
        for name, layer in alone.layers.items():
            assert torch.equal(found.layers[name].gradient, layer.gradient)


def test_a_group_of_one_still_names_the_equal_text_error():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "gather_objects", lambda _: ["a", "a", "b"])
        with pytest.raises(CalibrationError, match=r"process 2 has 'b' \(differing from process 0: \[2\]\)"):
            processes.assert_equal_everywhere("a", "the plan")
