"""Ways to die at the worst moment; each is called in a job's own process before it trains."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from rankwise.training import callback, marker, state
from tests.training.jobs import kill_now


def _on_call(owner: Any, name: str, number: int, *, after: bool) -> None:
    """Kills this process at the `number`-th call of `owner.name`, before or after it did its work."""
    original = getattr(owner, name)
    calls = [0]

    @functools.wraps(original)
    def sabotaged(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and not after:
            kill_now()
        result = original(*args, **kwargs)
        if calls[0] == number:
            kill_now()
        return result

    setattr(owner, name, sabotaged)


def after_the_first_step() -> None:
    """One step was made, nothing was saved."""
    _on_call(callback.SessionCallback, "on_step_end", 1, after=True)


def while_trainer_writes() -> None:
    """The adapter of the second checkpoint is written, its optimizer is not."""
    _on_call(Trainer, "_save_optimizer_and_scheduler", 2, after=False)


def before_the_marker() -> None:
    """Everything of the second checkpoint is written but the marker."""
    _on_call(state, "seal", 2, after=False)


def while_the_marker_is_staged() -> None:
    """The marker of the second checkpoint is staged, not renamed in."""
    original = Path.replace

    def replace(self: Path, target: Any) -> Path:
        if self.name == f".{marker.MARKER}.part" and Path(target).parent.name == "checkpoint-4":
            kill_now()
        return original(self, target)

    Path.replace = replace  # type: ignore[method-assign]


def after_the_marker_before_rotation() -> None:
    """Two complete checkpoints, though only one is to be kept."""
    _on_call(callback, "rotate", 2, after=False)


def in_rotation_before_the_files() -> None:
    """The old checkpoint has lost its marker and still has its files."""
    _on_call(marker.shutil, "rmtree", 1, after=False)


def in_rotation_among_the_files() -> None:
    """The old checkpoint is half removed."""
    original = shutil.rmtree

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith("checkpoint-"):
            os.remove(Path(path) / "optimizer.pt")  # noqa: PTH107
            kill_now()
        original(path, *args, **kwargs)

    marker.shutil.rmtree = rmtree  # type: ignore[assignment]


def after_the_last_step() -> None:
    """Trained, not finished: the run's end was never reached."""
    _on_call(callback.SessionCallback, "on_train_end", 1, after=False)


MOMENTS: tuple[Callable[[], None], ...] = (
    while_trainer_writes,
    before_the_marker,
    while_the_marker_is_staged,
    after_the_marker_before_rotation,
    in_rotation_before_the_files,
    in_rotation_among_the_files,
    after_the_last_step,
)
TELLING = (before_the_marker, in_rotation_among_the_files, after_the_last_step)
"""The moments that the default test run tries; the others run with the slow tests."""
