"""Ctrl-C and SIGTERM: a flag that is acted upon at the end of a step, never in the middle of one."""

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from rankwise.errors import TrainingInterrupted

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request to stop, and lets the second one abort at once.

    A context manager. Outside training the first signal raises TrainingInterrupted on the spot: there is nothing to
    save. Between `begin_steps` and `end_steps` it only sets `requested`; the callback saves a checkpoint at the end of
    the step and stops. The handlers found before are put back on leaving. Outside the main thread, where Python allows
    no handlers, it does nothing.

    Example:
        >>> with StopRequest() as stop:
        ...     stop.requested
        False
    """

    def __init__(self) -> None:
        self.requested: bool = False
        self.stepping: bool = False
        self.stepped: bool = False
        self._own = False
        self._found: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def begin_steps(self) -> None:
        """From here on a signal waits for the end of the step; installs the handlers if the caller has not."""
        self.stepping = self.stepped = True
        if not self.installed:
            self.install()
            self._own = True

    def end_steps(self) -> None:
        """From here on a signal acts at once; the handlers that `begin_steps` installed are put back."""
        self.stepping = False
        if self._own:
            self.restore()
            self._own = False

    @property
    def installed(self) -> bool:
        """Whether the handlers are in place."""
        return bool(self._found)

    def install(self) -> None:
        """Puts the handlers in place; a second call changes nothing."""
        if self._found or threading.current_thread() is not threading.main_thread():
            return
        self._found = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def restore(self) -> None:
        """Puts the handlers found by `install` back."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._found.items():
            with contextlib.suppress(ValueError, TypeError):  # an interpreter on its way out
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._found = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            self.restore()
            raise KeyboardInterrupt(f"second {name}: stopped at once, without a checkpoint")
        self.requested = True
        if not self.stepping:
            self.restore()
            when = (
                "after training: its checkpoints stay" if self.stepped else "before the first step: nothing was saved"
            )
            raise TrainingInterrupted(f"stopped by {name} {when}")
