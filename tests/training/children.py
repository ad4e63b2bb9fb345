"""Jobs in processes of their own, forked from a server that has imported everything: fresh, and quick to start."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.training import jobs

__all__ = ["finish", "start", "wait_for"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.training.jobs", "transformers.trainer", "trl.trainer.sft_trainer", "tests.training.sabotage"]
)
PATIENCE = 120.0


def start(job: jobs.Job, before: Callable[[], None] | None = None) -> ForkServerProcess:
    """Runs the job in a process of its own; `before` is called there first (a module-level function)."""
    process = CONTEXT.Process(target=jobs.run, args=(job, before))
    process.start()
    return process


def finish(process: ForkServerProcess) -> int:
    """Waits for the process; its exit code, negative for a signal."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"the job did not end within {PATIENCE} s")
    return process.exitcode


def wait_for(condition: Callable[[], Any], process: ForkServerProcess, folder: Path) -> None:
    """Polls until the condition holds or the process is gone."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.is_alive(), (
            f"the job in {folder.name} ended (exit code {process.exitcode}) before it could be hit"
        )
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)
